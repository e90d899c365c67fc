"""`checkpoint.keep_best` and `eval.patience`: which evaluation was the best survives whatever happens to the run.

The learning rate rises to a size at which the model unlearns what it has learnt: the loss of the evaluations falls, is
worse three times in a row, falls again to its lowest, and is worse to the end.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from launcher.cli import app
from launcher.console import make_console
from tests.distributed.test_background_saves import assert_same_state
from tests.distributed.test_divergence import damaged, nan_loss
from tests.ranks import losses, metrics, run_ranks, tiny_config, train
from tools.convert import convert
from trainer.checkpoint.find import candidates, find_best, locate_best
from trainer.checkpoint.manifest import read_checkpoint_manifest, step_folder
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, UserError
from trainer.state import TrainState
from trainer.tracking.status import read_status

STEPS, EVERY = 24, 2
KILLED = 7


def rising(workspace: Path, run_dir: Path, **sections: Any) -> Config:
    settings: dict[str, Any] = {
        "data": {"validation": str(workspace / "data")},
        "eval": {"every_steps": EVERY, "samples": 32},
        "optimizer": {"lr": 0.12},
        "schedule": {"warmup_steps": STEPS},
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 5, "keep_best": True},
    }
    merged = {name: {**settings.get(name, {}), **section} for name, section in sections.items()}
    return tiny_config(workspace, run_dir, **{**settings, **merged})


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval/loss"]) for line in metrics(run_dir) if "eval/loss" in line]


def state_of(run_dir: Path, step: int = STEPS) -> TrainState:
    return TrainState(**read_checkpoint_manifest(step_folder(run_dir / "checkpoints", step)).state)


def assert_judged(run_dir: Path, state: TrainState) -> None:
    """What a checkpoint records is what the evaluations up to it come to."""
    found = [(step, loss) for step, loss in evaluations(run_dir) if step <= state.step]
    best_step, best_loss = min(found, key=lambda one: one[1])
    after = len([step for step, _ in found if step > best_step])
    assert (state.best_step, state.best_loss, state.evaluations_since_best) == (best_step, best_loss, after)


@pytest.fixture(scope="module")
def clean(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("best") / "clean"
    assert train(rising(workspace, run_dir), 2) == EXIT_FINISHED
    return run_dir


def test_the_best_checkpoint_stays_beside_the_last_ones(clean: Path, workspace: Path, tmp_path: Path) -> None:
    state = state_of(clean)
    assert_judged(clean, state)
    assert state.best_step is not None
    assert 10 < state.best_step < 20, f"this shows nothing: {evaluations(clean)}"
    assert [candidate.step for candidate in candidates(clean)] == [STEPS, 20, state.best_step]
    best = find_best(candidates(clean))
    assert best is not None and best.step == state.best_step
    assert_judged(clean, state_of(clean, best.step))
    status = read_status(clean)
    assert status is not None and (status.best_step, status.best_loss) == (state.best_step, state.best_loss)

    plain = rising(workspace, tmp_path, checkpoint={"every_steps": EVERY, "keep_best": False, "keep_last": 99})
    assert train(plain, 2) == EXIT_FINISHED
    assert losses(tmp_path) == losses(clean) and evaluations(tmp_path) == evaluations(clean), "it changes no training"
    assert state_of(tmp_path) == state, "and is known without it"
    assert_same_state(step_folder(tmp_path / "checkpoints", state.best_step), best.folder)


def test_convert_takes_the_best_where_it_is_asked_to_and_names_it_otherwise(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = state_of(clean).best_step
    newest = convert(str(clean), str(tmp_path / "newest"), "float32", "5GB", make_console())
    assert f"the best evaluation was that of step {best}, loss " in capsys.readouterr().err
    command = ["convert", str(clean), "--best", "--output", str(tmp_path / "best")]
    assert app(command, standalone_mode=False) == EXIT_FINISHED
    assert "the best evaluation" not in capsys.readouterr().err
    assert newest.step == STEPS
    evaluated = dict(evaluations(clean))
    assert f"(step {best}) |" in (tmp_path / "best" / "README.md").read_text()
    models = [AutoModelForMaskedLM.from_pretrained(tmp_path / name) for name in ("newest", "best")]
    assert best is not None and evaluated[best] < evaluated[STEPS]
    assert not torch.equal(*(model.get_input_embeddings().weight for model in models))


@pytest.mark.parametrize(("step", "in_background"), [(1, False), (2, False), (2, True), (3, False)])
def test_a_run_that_is_killed_knows_its_best_all_the_same(
    step: int, in_background: bool, clean: Path, workspace: Path, tmp_path: Path
) -> None:
    """Killed in the step of the best save, where it has evaluated; before it commits; and a few steps later.

    In the background a save is another one from its beginning to its commit alone.
    """
    best = state_of(clean).best_step
    assert best is not None
    config = rising(workspace, tmp_path, checkpoint={"async": in_background})
    assert run_ranks(killed, 2, config, best, step) == [KILLED] * 2
    assert train(config, 2) == EXIT_FINISHED
    assert state_of(tmp_path) == state_of(clean)
    assert losses(tmp_path) == losses(clean) and evaluations(tmp_path) == evaluations(clean)
    assert {STEPS, 20, best} <= {candidate.step for candidate in candidates(tmp_path)}


def killed(config: Config, best: int, when: int) -> int:
    """Runs on each rank: all are gone before the save of `best` begins (1), before its commit (2), or 3 steps on."""
    from trainer.checkpoint.save import Saver
    from trainer.loop import Loop
    from trainer.train import run

    begin, commit, step = Saver._begin, Saver.finish, Loop._train_step

    def begin_save(self: Saver, state: TrainState, *arguments: Any, **named: Any) -> object:
        if state.step == best and when == 1:
            os._exit(KILLED)
        return begin(self, state, *arguments, **named)

    def finish(self: Saver) -> object:
        if self._unfinished is not None and self._unfinished.step == best and when == 2:
            self._unfinished.wait()
            os._exit(KILLED)
        return commit(self)

    def train_step(self: Loop, *arguments: Any) -> object:
        if self.state.step == best + 3 and when == 3:
            os._exit(KILLED)
        return step(self, *arguments)

    Saver._begin, Saver.finish, Loop._train_step = begin_save, finish, train_step  # type: ignore[method-assign,assignment]
    return run(config)


def test_an_evaluation_that_a_stop_has_cut_short_is_judged_after_the_resume_and_not_forgotten(
    clean: Path, workspace: Path, tmp_path: Path
) -> None:
    """The checkpoint of its step is there before it is done."""
    best = state_of(clean).best_step
    assert best is not None
    config = rising(workspace, tmp_path)
    assert run_ranks(stopped_in, 2, config, best) == [EXIT_STOPPED_AFTER_SAVING] * 2
    assert state_of(tmp_path, best).best_step == best - EVERY
    assert run_ranks(killed_in, 2, config, best + 1) == [KILLED] * 2
    assert state_of(tmp_path, best).best_step == best
    assert train(config, 2) == EXIT_FINISHED
    assert state_of(tmp_path) == state_of(clean) and evaluations(tmp_path) == evaluations(clean)


def stopped_in(config: Config, step: int) -> int:
    """Runs on each rank: TERM reaches rank 0 in a step."""
    return _struck(config, step, lambda: os.kill(os.getpid(), signal.SIGTERM), rank="0")


def killed_in(config: Config, step: int) -> int:
    """Runs on each rank: all are gone in a step."""
    return _struck(config, step, lambda: os._exit(KILLED))


def _struck(config: Config, step: int, strike: Any, rank: str = "") -> int:
    from trainer.loop import Loop
    from trainer.train import run

    original = Loop._train_step

    def train_step(self: Loop, *arguments: Any) -> object:
        if self.state.step + 1 == step and os.environ["RANK"] in (rank or os.environ["RANK"]):
            strike()
        return original(self, *arguments)

    Loop._train_step = train_step  # type: ignore[method-assign,assignment]
    return run(config)


def test_a_rollback_forgets_the_evaluations_that_it_takes_back(workspace: Path, tmp_path: Path) -> None:
    """At steps that are skipped there are evaluations too; the run returns to before them."""
    resilience = {"on_divergence": "rollback", "max_skipped_steps": 4}
    sections = {"resilience": resilience, "batch": {"micro_size": 2}, "checkpoint": {"every_steps": 4}}
    config = rising(workspace, tmp_path, **sections)
    assert run_ranks(damaged, 2, config, nan_loss, 15, 22) == [EXIT_FINISHED] * 2
    state = state_of(tmp_path)
    assert state.rollbacks
    assert_judged(tmp_path, state)
    for candidate in candidates(tmp_path):
        assert_judged(tmp_path, state_of(tmp_path, candidate.step))
    assert find_best(candidates(tmp_path)) is not None


def end_by(patience: int, found: list[tuple[int, float]]) -> tuple[int, int]:
    """The step at which so many evaluations in a row were no better, and that of the best, one evaluation at a time."""
    best, worse = found[0], 0
    for step, loss in found[1:]:
        best, worse = ((step, loss), 0) if loss < best[1] else (best, worse + 1)
        if worse == patience:
            return step, best[0]
    raise AssertionError(f"this shows nothing: {found}")


def test_patience_ends_the_run_saved_and_finished(clean: Path, workspace: Path, tmp_path: Path) -> None:
    early = tmp_path / "early"
    end, best = end_by(2, evaluations(clean))
    config = rising(workspace, early, eval={"patience": 2})
    assert run_ranks(killed_in, 2, config, end) == [KILLED] * 2
    assert train(config, 2) == EXIT_FINISHED
    state = state_of(early, end)
    assert (state.best_step, state.evaluations_since_best) == (best, 2)
    assert losses(early) == losses(clean)[:end], "up to there, the learning rate included, it is the same run"
    assert {end, best} <= {candidate.step for candidate in candidates(early)}
    status = read_status(early)
    assert status is not None and (status.state, status.step) == ("finished", end)
    said = (
        f"stopped early at step {end}: of the last 2 evaluations none was better than the best, that of step {best}, "
    )
    assert status.reason.startswith(said)

    before = {path: path.read_bytes() for path in (early / "metrics.jsonl", early / "status.json")}
    for resume in ("auto", "must"):
        assert train(config, 2, resume=resume) == EXIT_FINISHED
    assert {path: path.read_bytes() for path in before} == before, "nothing is left to do"

    later, same = end_by(3, evaluations(clean))
    assert later > end and same == best
    assert train(rising(workspace, early, eval={"patience": 3}), 2) == EXIT_FINISHED
    assert state_of(early, later).evaluations_since_best == 3
    assert train(rising(workspace, early), 2) == EXIT_FINISHED
    assert losses(early) == losses(clean) and state_of(early) == state_of(clean)


def test_it_is_known_on_other_ranks_and_judged_anew_on_other_blocks_and_in_another_run(
    workspace: Path, tmp_path: Path
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    assert train(rising(workspace, first, eval={"patience": 2}), 2) == EXIT_FINISHED
    before = state_of(first, end := max(candidate.step for candidate in candidates(first)))
    assert train(rising(workspace, first, eval={"patience": 3}), 1) == EXIT_FINISHED
    after = state_of(first, end + EVERY)
    assert (after.best_step, after.best_loss, after.evaluations_since_best) == (before.best_step, before.best_loss, 3)

    fewer = rising(workspace, first, eval={"samples": 16, "patience": 1})
    assert train(fewer, 1) == EXIT_FINISHED, "which was out of patience on the old blocks: nothing is left to do"
    assert train(rising(workspace, first, eval={"samples": 16}), 1) == EXIT_FINISHED
    judged = state_of(first)
    assert judged.best_step is not None and judged.best_step > end + EVERY, "32 blocks say nothing of 16"

    best = find_best(candidates(first))
    assert best is not None
    assert train(rising(workspace, other), 1, resume=str(best.folder)) == EXIT_FINISHED
    assert_judged(other, state_of(other))
    found = find_best(candidates(other))
    assert found is not None and found.step >= best.step, "it is among the run's own"


def test_where_the_save_of_the_best_has_failed_the_one_before_it_stays(
    clean: Path, workspace: Path, tmp_path: Path
) -> None:
    best = state_of(clean).best_step
    assert best is not None
    assert run_ranks(full_disk_at, 2, rising(workspace, tmp_path), best) == [EXIT_FINISHED] * 2
    state, found = state_of(tmp_path), candidates(tmp_path)
    assert state == state_of(clean), "it was the best all the same"
    before = min((one for one in evaluations(tmp_path) if one[0] < best), key=lambda one: one[1])[0]
    assert [candidate.step for candidate in found] == [STEPS, 20, before] and find_best(found) is None
    with pytest.raises(UserError, match=f"is that of step {best}, which has no checkpoint any more") as caught:
        locate_best(tmp_path)
    assert str(step_folder(tmp_path / "checkpoints", before)) in caught.value.remedy


def full_disk_at(config: Config, step: int) -> int:
    """Runs on each rank: rank 1 cannot write large files when a step has been done."""
    import resource

    from trainer.checkpoint.save import Saver
    from trainer.train import run

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = Saver.save

    def limited(self: Saver, state: TrainState) -> Path | None:
        limit = 20_000 if state.step == step and self.world.rank == 1 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return save(self, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Saver.save = limited  # type: ignore[method-assign]
    return run(config)
