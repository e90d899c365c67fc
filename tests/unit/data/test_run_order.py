"""The order of a run with phases: each phase walks its own blocks, every one once an epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import BatchConfig, DataConfig
from trainer.data.order.compare import order_differences, recorded_phases
from trainer.data.order.mixture import mixture_order
from trainer.data.order.run_order import RunOrder
from trainer.data.order.sample_order import SampleOrder
from trainer.schedule.phases import lay_out

TOKENS = (9000, 4000)


def order_of(seq_len: int = 32, global_size: int = 8, sources: int = 1, **data: Any) -> RunOrder:
    """Over sources of TOKENS; phases, stages and the like from `data`."""
    train = [{"path": f"source{number}", "weight": 1} for number in range(sources)]
    config = DataConfig.model_validate(
        {"train": train, "seq_len": seq_len, "chunk_blocks": 8, "window_chunks": 4, "mixture_block": 16, **data}
    )
    phases, tokens = lay_out(config, BatchConfig(global_size=global_size, micro_size=1)), TOKENS[:sources]
    blocks = [[count // (phase.seq_len - 2) for count in tokens] for phase in phases]
    return mixture_order(config, phases, blocks, tokens, seed=5)


def recorded(order: RunOrder) -> dict[str, Any]:
    sources = [
        {"name": f"source{number}", "fingerprint": f"{number}", "quarantine": []}
        for number in range(order.source_count)
    ]
    return {**order.describe(), "sources": sources}


PHASES = [{"seq_len": 10, "until_tokens": 9000}, {"seq_len": 18, "until_tokens": 30_000}]


def test_a_run_of_one_phase_has_the_order_it_always_had():
    samples = np.arange(2000)
    plain = SampleOrder([TOKENS[0] // 30], [1.0], 5, 8, 4, 16)
    for found, expected in zip(order_of().locate(samples), plain.locate(samples), strict=True):
        assert (found == expected).all()
    phased = order_of(phases=[{"seq_len": 32, "until_tokens": 3200}])
    same = phased.locate(np.arange(104))[1] == plain.locate(np.arange(104))[1]
    assert same.all(), "and so has the first of several"


@given(
    lengths=st.lists(st.tuples(st.integers(8, 32), st.integers(500, 9000)), min_size=1, max_size=3),
    sources=st.integers(1, 2),
)
def test_every_block_once_a_source_epoch_and_phase(lengths: list[tuple[int, int]], sources: int):
    phases, until = [], 0
    for seq_len, tokens in lengths:
        until += tokens
        phases.append({"seq_len": seq_len, "until_tokens": until})
    order = order_of(phases=phases, sources=sources)
    end = order.phases[-1].first_sample + 700
    located, blocks = order.locate(np.arange(end))
    starts = [phase.first_sample for phase in order.phases]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True)):
        counts, visits = order.orders[number].blocks, order.orders[number].visits(stop - start)
        for source in range(sources):
            times = Counter(blocks[start:stop][located[start:stop] == source].tolist())
            whole, begun = divmod(visits[source], counts[source])
            if sources == 1:
                assert Counter(times[block] for block in range(counts[source])) == +Counter(
                    {whole: counts[source] - begun, whole + 1: begun}
                )
            assert sum(times.values()) == visits[source] and max(times, default=0) < counts[source]


def test_phases_of_one_length_have_different_orders():
    order = order_of(phases=[{"seq_len": 32, "until_tokens": 32 * 400}])
    first, second = (order.locate(start + np.arange(296))[1] for start in (0, 400))
    assert (first == second).mean() < 0.05


def test_epochs_and_tokens_of_sources_add_up_over_phases():
    order = order_of(phases=PHASES, sources=2)
    end = order.phases[2].first_sample + 100
    located, _ = order.locate(np.arange(end))
    lengths = np.array([order.phases[order.phases.number_at(sample)].seq_len for sample in range(end)])
    assert order.source_tokens(end) == [int(lengths[located == source].sum()) for source in range(2)]
    assert sum(order.source_tokens(end)) == order.phases.tokens(end)
    passes = [
        sum(
            1 / order.orders[order.phases.number_at(sample)].blocks[source]
            for sample in np.flatnonzero(located == source)
        )
        for source in range(2)
    ]
    assert order.epochs(end) == pytest.approx(passes)


def test_weights_change_at_their_token_whatever_the_phase():
    stages = [{"from_tokens": 5000, "weights": {"source1": 1}}, {"from_tokens": 20_000, "weights": {"source0": 1}}]
    order = order_of(phases=PHASES, sources=2, stages=stages)
    located, _ = order.locate(np.arange(order.phases[2].first_sample + 200))
    first, second = order.phases.sample_at(5000), order.phases.sample_at(20_000)
    assert order.phases.number_at(first) == 0 and order.phases.number_at(second) == 1
    assert set(located[:first].tolist()) == {0, 1}
    assert set(located[first:second].tolist()) == {1} and set(located[second:].tolist()) == {0}


def test_locating_far_out_takes_no_longer():
    order = order_of(phases=[{"seq_len": 16, "until_tokens": 2 * 10**14}])
    begin = order.phases[1].first_sample
    assert begin > 10**13
    _, blocks = order.locate(np.array([begin - 1, begin, begin + 10**14]))
    assert blocks[1] == order.orders[1].locate(np.array([0]))[1][0]


@pytest.mark.parametrize(
    ("before", "after", "samples", "allowed"),
    [
        ([], [{"seq_len": 32, "until_tokens": 3200}], 104, True),  # of one length: the same samples so far
        ([], [{"seq_len": 16, "until_tokens": 3200}], 8, False),
        (PHASES, [*PHASES[:1], {"seq_len": 20, "until_tokens": 30_000}], 904, True),  # the second has not begun
        (PHASES, [*PHASES[:1], {"seq_len": 20, "until_tokens": 30_000}], 905, False),
        (PHASES, [{"seq_len": 10, "until_tokens": 12_000}, *PHASES[1:]], 904, True),
        (PHASES, [{"seq_len": 10, "until_tokens": 12_000}, *PHASES[1:]], 912, False),
        (PHASES, [{"seq_len": 10, "until_tokens": 5000}, *PHASES[1:]], 500, True),
        (PHASES, [{"seq_len": 10, "until_tokens": 5000}, *PHASES[1:]], 512, False),
        (PHASES, PHASES, 10**6, True),
    ],
)
def test_phases_may_change_ahead_and_not_in_the_past(
    before: list[dict[str, int]], after: list[dict[str, int]], samples: int, allowed: bool
):
    old, new = order_of(phases=before), order_of(phases=after)
    differences = order_differences(recorded(old), recorded(new), samples)
    assert (differences == []) == allowed
    lengths = [
        [order.phases[order.phases.number_at(sample)].seq_len for sample in range(min(samples, 2000))]
        for order in (old, new)
    ]
    one, other = (order.locate(np.arange(min(samples, 2000)))[1] for order in (old, new))
    assert (lengths[0] == lengths[1] and (one == other).all()) == allowed, "the rule is what the order does"
    if not allowed:
        assert f"other phases can begin at token {old.phases.tokens(samples):,} at the earliest" in differences[0]


def test_a_record_from_before_there_were_phases_is_one_of_one_phase():
    record = recorded(order_of())
    (phase,) = record.pop("phases")
    old = {**record, "seq_len": 32, "payload": 30, "spans": phase["spans"]}
    old["sources"] = [{**source, "blocks": 300} for source in old["sources"]]
    assert order_differences(old, recorded(order_of()), 1000) == []
    assert "blocks of 32, now blocks of 24" in order_differences(old, recorded(order_of(seq_len=24)), 1000)[0]
    assert [each["blocks"] for each in recorded_phases(old)] == [[300]]


def test_partners_are_those_of_the_phase():
    order = order_of(phases=PHASES, sources=2)
    samples = np.arange(3000)
    partners, expected = order.partners(samples), np.empty(3000, np.int64)
    starts = [phase.first_sample for phase in order.phases]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], 3000], strict=True)):
        expected[start:stop] = order.orders[number].partners(np.arange(stop - start))
    assert np.array_equal(partners, expected)
    assert (partners != order.locate(samples)[1]).all()


def test_a_phase_mixes_its_sources_by_weights_of_its_own():
    phases = [
        {"seq_len": 32, "until_tokens": 32 * 160, "weights": {"source0": 1}},
        {"seq_len": 32, "until_tokens": 32 * 320},
        {"seq_len": 32, "until_tokens": 32 * 480, "weights": {"source0": 1, "source1": 3}},
    ]
    order = order_of(sources=2, phases=phases)
    sources = order.locate(np.arange(640))[0].reshape(4, 160)
    assert [int(of_phase.sum()) for of_phase in sources] == [0, 80, 120, 80], "the last as train says: 1 to 1"
    assert order.epochs(640) == pytest.approx([(160 + 80 + 40 + 80) / 300, (80 + 120 + 80) / 133])
    for samples, differs in ((320, False), (321, True)):
        other = order_of(sources=2, phases=[*phases[:2], {**phases[2], "weights": {"source1": 1}}])
        lines = order_differences(recorded(order), recorded(other), samples)
        assert bool(lines) == differs, "only what has been seen may not change"
        assert all("the mixture of the 321 samples" in line and "data.phases" in line for line in lines)


def test_a_theta_of_the_past_may_not_change():
    order = recorded(order_of(phases=PHASES))
    first, second = ({"rope_theta": theta} for theta in (10_000.0, 20_000.0))

    def with_thetas(*thetas: dict[str, float] | None) -> dict[str, Any]:
        each = zip(order["phases"], thetas, strict=True)
        return {**order, "phases": [{**phase, **({"rope_theta": theta} if theta else {})} for phase, theta in each]}

    begins = order["phases"][1]["first_sample"]
    saved, moved = with_thetas(first, second, second), with_thetas(first, first, second)
    assert order_differences(saved, moved, begins) == [], "what lies ahead may"
    (line,) = order_differences(saved, moved, begins + 1)
    assert "the rope theta of phase 2 was 20,000, now that of the first" in line
    assert order_differences(order, with_thetas(first, first, first), begins + 1) == [], "none recorded is one for all"
    assert order_differences(order, saved, begins + 1)
