"""Models with code of their own: run when it is asked for and never else, and what can be wrong with it is a card."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.own_code import AUTO_MAP, CONFIGURATION, MODELING, leaves_a_marker, write_code
from tests.tiny_models import SEQ_LEN, continued, gradients, masked_batch, saved, vocabulary
from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.classes import CAUSAL, MASKED, PAIRED
from trainer.model.hf_config import build_config
from trainer.model.model_code import SHIPPED, code_of, unused_code
from trainer.model.prediction_head import install
from trainer.model.rehearsal import rehearse


def own(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"config": str(folder), "tokenizer": "unused", "code": True, **changes})


def refused(settings: ModelConfig, family: str = MASKED) -> UserError:
    """What a start would say; `validate` and the building of the model say the same."""
    with pytest.raises(UserError) as caught:
        rehearse(settings, vocabulary(), [SEQ_LEN], family)
    with pytest.raises(UserError) as again:
        build_model(settings, vocabulary(), SEQ_LEN, 0, family)
    assert again.value.problem == caught.value.problem
    return caught.value


# Run when it is asked for


def test_a_folder_with_code_is_trained_with_it(tmp_path: Path) -> None:
    settings = own(write_code(tmp_path / "bag"))
    rehearse(settings, vocabulary(), [SEQ_LEN])
    built = build_model(settings, vocabulary(), SEQ_LEN, 0)
    assert type(built.model).__name__ == "BagForMaskedLM"
    assert not [note for note in built.notes if note.startswith("head:")], "it names its head"
    code = code_of(built.model.config)
    assert code is not None and not code.is_shipped
    assert set(code.files) == {"configuration_bag.py", "modeling_bag.py"}
    assert built.model.config.auto_map == AUTO_MAP
    assert not list((tmp_path / "bag").glob("__pycache__")), "nothing is written beside it"
    # By the path of its config.json as well.
    assert type(build_model(own(tmp_path / "bag" / "config.json"), vocabulary(), SEQ_LEN, 0).model) is type(built.model)


def test_a_head_that_is_named_is_restricted_and_any_other_whole(tmp_path: Path) -> None:
    input_ids, index, labels, _ = masked_batch()
    found = {}
    for name, modeling in (("named", MODELING), ("whole", MODELING.replace('    maskwright_head = "lm_head"\n', ""))):
        built = build_model(own(write_code(tmp_path / name, modeling)), vocabulary(), SEQ_LEN, 0)
        head = install(built.model)
        said = [note for note in built.notes if note.startswith("head:")]
        assert head.in_head == (name == "named") == (not said)
        with head.select(index):
            logits = built.model(input_ids=input_ids).logits
        assert logits.shape[0] == (len(index) if name == "named" else len(input_ids))
        torch.nn.functional.cross_entropy(head.rows(logits, index), labels).backward()
        found[name] = gradients(built.model)
    assert found["named"].keys() == found["whole"].keys()
    for name, gradient in found["named"].items():
        assert torch.allclose(gradient, found["whole"][name], atol=1e-6), name


def test_a_causal_class_is_told_by_its_entry(tmp_path: Path) -> None:
    auto_map = {**AUTO_MAP, "AutoModelForCausalLM": "modeling_bag.BagForCausalLM"}
    settings = own(write_code(tmp_path / "bag", auto_map=auto_map))
    for family, name in ((MASKED, "BagForMaskedLM"), (CAUSAL, "BagForCausalLM")):
        assert build_config(settings, vocabulary(), SEQ_LEN, family).architectures == [name]
    assert "is no encoder with a head for pairs" in refused(settings, PAIRED).problem


def test_two_versions_of_a_folder_are_two_codes(tmp_path: Path) -> None:
    first = build_model(own(write_code(tmp_path / "bag")), vocabulary(), SEQ_LEN, 0).model.eval()
    changed = MODELING.replace("torch.tanh", "torch.sin")
    second = build_model(own(write_code(tmp_path / "bag", changed)), vocabulary(), SEQ_LEN, 0).model.eval()
    again = build_model(own(write_code(tmp_path / "bag")), vocabulary(), SEQ_LEN, 0).model.eval()
    ids = masked_batch()[0]
    assert type(first) is type(again) is not type(second)
    assert torch.equal(first(ids).logits, again(ids).logits)
    assert not torch.equal(first(ids).logits, second(ids).logits)


def test_a_saved_model_with_its_code_is_continued_and_grown(tmp_path: Path) -> None:
    model = build_model(own(write_code(tmp_path / "bag")), vocabulary(), SEQ_LEN, 0).model
    model.save_pretrained(tmp_path / "model")
    code = code_of(model.config)
    assert code is not None
    code.write(tmp_path / "model")
    settings = continued(tmp_path / "model").model_copy(update={"code": True})
    rehearse(settings, vocabulary(230), [SEQ_LEN])
    grown = build_model(settings, vocabulary(230), SEQ_LEN, 0).model
    assert torch.equal(grown.bag.table.weight[:200], model.bag.table.weight)


# Never else


@pytest.mark.parametrize("key", ["config", "from_pretrained"])
def test_without_being_asked_nothing_of_a_folder_is_run(key: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = write_code(tmp_path / "bag", leaves_a_marker(marker) + MODELING, leaves_a_marker(marker) + CONFIGURATION)
    modules = set(sys.modules)
    error = refused(ModelConfig.model_validate({key: str(folder), "tokenizer": "unused"}))
    assert "the folder wants code of its own to be run" in error.problem
    assert (error.where, error.remedy) == (f"model.{key}", "If you trust that code, set model.code=true.")
    assert not marker.exists()
    assert not {name for name in set(sys.modules) - modules if "bag" in name}
    build_config(own(folder), vocabulary(), SEQ_LEN)
    assert marker.exists(), "the test would have seen it"


def test_a_known_type_with_code_beside_it_is_the_known_class(tmp_path: Path) -> None:
    """As transformers has it without trust_remote_code: many folders keep code from before their type was known."""
    folder, marker = saved(tmp_path, "bert"), tmp_path / "marker"
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "auto_map": AUTO_MAP}))
    for name in ("configuration_bag", "modeling_bag"):
        (folder / f"{name}.py").write_text(leaves_a_marker(marker))
    assert type(build_model(continued(folder), vocabulary(), SEQ_LEN, 0).model).__name__ == "BertForMaskedLM"
    assert not marker.exists()


def test_what_ships_is_not_taken_from_a_folder(tmp_path: Path) -> None:
    """A type that maskwright brings along is its own code, whatever code lies in the folder that names the type."""
    folder, marker = shutil.copytree(SHIPPED["nezha"], tmp_path / "nezha"), tmp_path / "marker"
    with open(folder / "modeling_nezha.py", "a") as file:
        file.write(leaves_a_marker(marker))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    settings = ModelConfig(config=str(folder), tokenizer="unused", overrides=sizes)
    code = code_of(build_model(settings, vocabulary(), SEQ_LEN, 0).model.config)
    assert code is not None and code.is_shipped and not marker.exists()
    own_code = code_of(build_model(settings.model_copy(update={"code": True}), vocabulary(), SEQ_LEN, 0).model.config)
    assert own_code is not None and not own_code.is_shipped and marker.exists()


# What can be wrong with it


@pytest.mark.parametrize(
    ("changes", "problem", "where"),
    [
        ({"auto_map": None}, "has no auto_map entry 'AutoConfig'", "config.json"),
        ({"auto_map": {"AutoModelForMaskedLM": "modeling_bag.BagForMaskedLM"}}, "entry 'AutoConfig'", "config.json"),
        ({"auto_map": {"AutoConfig": "configuration_bag.BagConfig"}}, "entry 'AutoModelForMaskedLM'", "config.json"),
        (
            {"auto_map": {**AUTO_MAP, "AutoConfig": "some/repo--configuration.C"}},
            "is no class in a file",
            "config.json",
        ),
        ({"auto_map": {**AUTO_MAP, "AutoConfig": "..evil.C"}}, "is no class in a file", "config.json"),
        ({"auto_map": {**AUTO_MAP, "AutoModel": "other.Bag"}}, "auto_map needs other.py", "other.py"),
        ({"auto_map": {**AUTO_MAP, "AutoConfig": "configuration_bag.Bag"}}, "has no class 'Bag'", "config.json"),
        (
            {"auto_map": {**AUTO_MAP, "AutoModelForMaskedLM": "configuration_bag.BagConfig"}},
            "configuration_bag.py has no PreTrainedModel 'BagConfig'",
            "config.json",
        ),
        ({"model_type": "sack"}, "BagConfig is of model type 'bag', its config.json of 'sack'", "bag.py"),
        ({"model_type": None}, "it names no model_type", "model.config"),
    ],
)
def test_a_config_that_does_not_name_its_classes(changes: Any, problem: str, where: str, tmp_path: Path) -> None:
    error = refused(own(write_code(tmp_path / "bag", **changes)))
    assert problem in error.problem
    assert error.where.startswith("model.config") and error.where.endswith(where)


def _line(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


IMPORT = "from .configuration_bag import BagConfig"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("import torch\n", "import torch\nimport no_such_package\n", "ModuleNotFoundError: No module named 'no_such_p"),
        ("class BagModel(", "class BagModel(:\n", "SyntaxError: "),
        ("class BagModel(", "1 / 0\nclass BagModel(", "ZeroDivisionError: division by zero"),
        ("class BagModel(", "raise SystemExit(0)\nclass BagModel(", "SystemExit: 0"),
        (IMPORT, "import configuration_bag", "ModuleNotFoundError: No module named 'configuration_bag'"),
    ],
)
def test_an_error_in_the_code_is_named_with_its_line(old: str, new: str, problem: str, tmp_path: Path) -> None:
    modeling = MODELING.replace(old, new, 1)
    folder = write_code(tmp_path / "bag", modeling)
    error = refused(own(folder))
    assert f"The model's own code cannot be imported: {problem}" in error.problem
    line = _line(modeling, new.strip("\n").splitlines()[-1 if "import no_such" in new else 0])
    assert error.where == f"model.config: {folder / 'modeling_bag.py'}:{line}"


def test_a_file_that_another_one_imports_is_missing(tmp_path: Path) -> None:
    folder = write_code(tmp_path / "bag", MODELING.replace(IMPORT, f"{IMPORT}\nfrom .layers import Layer"))
    error = refused(own(folder))
    assert error.problem == "modeling_bag.py needs layers.py of the model's own code, and there is no such file."
    assert error.where == f"model.config: {folder / 'layers.py'}"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("vocab_size=100,", "vocab_size,", "BagConfig() cannot be made without arguments"),
        ("        self.mix = nn", "        self.mix = 1 / 0  # nn", "can be built: ZeroDivisionError"),
        ("hidden = self.table(input_ids)", "hidden = 1 / 0", "BagForMaskedLM cannot compute a block"),
    ],
)
def test_an_error_when_it_is_used_is_a_card(old: str, new: str, problem: str, tmp_path: Path) -> None:
    folder = write_code(tmp_path / "bag", MODELING.replace(old, new), CONFIGURATION.replace(old, new))
    with pytest.raises(UserError) as caught:
        rehearse(own(folder), vocabulary(), [SEQ_LEN])
    assert problem in caught.value.problem
    place = caught.value.where.removeprefix(f"model.config: {folder}/")
    assert re.fullmatch(r"configuration_bag\.py|modeling_bag\.py:\d+", place), caught.value.where


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ("logits", "gives a Tensor, and not an output with `logits`"),
        ("(logits,)", "gives a tuple, and not an output with `logits`"),
        ("MaskedLMOutput(logits=None)", "gives no `logits`, and not an output with `logits`"),
        ("MaskedLMOutput(logits=logits[..., :10])", f"gives logits of shape [1, {SEQ_LEN}, 10]"),
    ],
)
def test_a_forward_pass_without_the_logits_is_a_card(returned: str, problem: str, tmp_path: Path) -> None:
    usual = "return MaskedLMOutput(logits="
    line = next(line for line in MODELING.splitlines() if usual in line)
    given = line.partition(usual)[2].removesuffix(")")
    indent = line[: len(line) - len(line.lstrip())]
    folder = write_code(
        tmp_path / "bag", MODELING.replace(line, f"{indent}logits = {given}\n{indent}return {returned}")
    )
    with pytest.raises(UserError) as caught:
        rehearse(own(folder), vocabulary(), [SEQ_LEN])
    assert problem in caught.value.problem and caught.value.where == "model.config"


@pytest.mark.parametrize("name", ["bag", "bag.table", "unused"])
def test_a_head_that_is_another_part_of_the_class_is_a_card(name: str, tmp_path: Path) -> None:
    unused = MODELING.replace("        self.lm_head", "        self.unused = nn.Identity()\n        self.lm_head", 1)
    folder = write_code(tmp_path / "bag", unused.replace('maskwright_head = "lm_head"', f'maskwright_head = "{name}"'))
    with pytest.raises(UserError) as caught:
        rehearse(own(folder), vocabulary(), [SEQ_LEN])
    assert f"With '{name}' given two positions" in caught.value.problem
    assert caught.value.where == f"model.config, maskwright_head = '{name}'"


def test_code_that_is_not_used_is_said(tmp_path: Path) -> None:
    same, changed = (shutil.copytree(SHIPPED["nezha"], tmp_path / name) for name in ("same", "changed"))
    with open(changed / "modeling_nezha.py", "a") as file:
        file.write("# changed\n")
    assert unused_code(str(same)) == []
    assert unused_code(str(changed)) == [
        f"code: '{changed}' has code of its own, which is not used; maskwright's class of its type is"
    ]
    folder = saved(tmp_path, "bert")
    assert unused_code(str(folder)) == [] == unused_code(None) == unused_code("org/name")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "auto_map": AUTO_MAP}))
    (folder / "modeling_bag.py").touch()
    (line,) = unused_code(str(folder))
    assert "transformers' class" in line
    assert line in build_model(continued(folder), vocabulary(), SEQ_LEN, 0).notes


def test_a_head_that_is_no_part_of_the_class_is_a_card(tmp_path: Path) -> None:
    folder = write_code(tmp_path / "bag", MODELING.replace('maskwright_head = "lm_head"', 'maskwright_head = "head"'))
    error = refused(own(folder))
    assert error.problem == "BagForMaskedLM has no submodule 'head', which its maskwright_head names."


def test_weights_of_other_names_are_a_card(tmp_path: Path) -> None:
    model = build_model(own(write_code(tmp_path / "bag")), vocabulary(), SEQ_LEN, 0).model
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "bag", tmp_path / "model", dirs_exist_ok=True)
    renamed = MODELING.replace("self.mix", "self.blend")
    write_code(tmp_path / "model", renamed, vocab_size=200)
    error = refused(continued(tmp_path / "model").model_copy(update={"code": True}))
    assert "lacks 2 weights of the encoder of BagForMaskedLM: bag.blend.bias, bag.blend.weight" in error.problem
    assert "It holds bag.mix.bias, bag.mix.weight" in error.problem


def test_document_attention_wants_a_class_that_says_so(tmp_path: Path) -> None:
    error = refused(own(write_code(tmp_path / "bag"), document_attention=True))
    assert error.problem == "BagForMaskedLM cannot keep its attention within documents."
    assert "maskwright_documents" in error.remedy


def test_code_is_for_a_folder_on_this_machine(tmp_path: Path) -> None:
    error = refused(own(Path("someone/model")).model_copy(update={"config": "someone/model"}))
    assert error.problem == "'someone/model' is no folder on this machine, and code is run from a folder alone."
    with pytest.raises(ValidationError, match="code does nothing with preset"):
        ModelConfig(preset="nezha-base", tokenizer="t", code=True)
