"""A generator and the model that finds its tokens out, as one module: replaced-token detection.

ELECTRA (Clark et al., arXiv:2003.10555): the generator, a masked language model, predicts masked tokens; one token is
drawn from each prediction, and the other model, the discriminator, tells of each token of the block whether it is the
original one. No gradient passes through the draw. Both are stock models, and are trained together, by one loss.

They may share their embeddings, wholly or as DeBERTa-v3 does (He et al., arXiv:2111.09543, section 3.2): there the
discriminator reads the generator's table, without a gradient to it, plus a table of differences of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.data.batch import DRAWS, Documents, Score
from trainer.errors import UserError
from trainer.model.classes import GENERATOR, MAIN
from trainer.model.forward import Forward, Pass
from trainer.model.hidden_states import last_states, showing_states
from trainer.model.sampling import sample_tokens

EMBEDDINGS, DISENTANGLED = "embeddings", "disentangled"
_WHERE = "objective.generator.share"


@dataclass
class Replaced:
    """What a batch has become.

    Attributes:
        logits: [n, vocabulary], the generator's at the predicted positions or, with a `Score`, [n, c].
        sampled: int64 [n], what the discriminator was shown there.
        detected: [B·S, 1], its logit of each token for having been replaced.
        tokens: int64 [B, S], all that it was shown.
    """

    logits: torch.Tensor
    sampled: torch.Tensor
    detected: torch.Tensor
    tokens: torch.Tensor


class GeneratorAndDiscriminator(nn.Module):
    """The two models, with what they share; see `share_embeddings`."""

    def __init__(self, generator: PreTrainedModel, discriminator: PreTrainedModel) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    @property
    def exports(self) -> dict[str, PreTrainedModel]:
        """The two by the name of their folder; as `BuiltModel.exports`."""
        return {MAIN: self.discriminator, GENERATOR: self.generator}

    def prepare(self, device: torch.device, document_attention: bool) -> tuple[Forward, Forward]:
        """Make what calls the generator and the discriminator, before the module is wrapped, moved or compiled."""
        self._generate = Forward(self.generator, device, document_attention)
        self._detect = Forward(self.discriminator, device, document_attention)
        return self._generate, self._detect

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the two models, each in a graph of its own; the draw between them stays as it is."""
        self.generator.compile(*args, **kwargs)
        self.discriminator.compile(*args, **kwargs)

    def forward(
        self, inputs: Mapping[str, torch.Tensor], prediction_index: torch.Tensor, documents: Documents | None
    ) -> tuple[torch.Tensor, ...]:
        """Predict, draw, and tell; returns the fields of `Replaced`.

        Args:
            inputs: as of a `Batch`, with DRAWS.
            prediction_index: int64 [n].
        """
        shown = {name: value for name, value in inputs.items() if name != DRAWS}
        draws, ids = inputs[DRAWS].flatten(), inputs["input_ids"]
        logits = self._generate(shown, prediction_index, documents).logits
        before = ids.flatten().gather(0, prediction_index)
        sampled = torch.where(draws < 0, before, sample_tokens(logits.detach(), draws))
        # A position that stands for no prediction may come several times, each time with the token that it has.
        tokens = ids.flatten().scatter(0, prediction_index, sampled).view_as(ids)
        detected = self._detect({**shown, "input_ids": tokens}, None, documents).logits
        return logits, sampled, detected, tokens


class ReplacingForward:
    """Calls a `GeneratorAndDiscriminator`; as `trainer.model.forward.Forward`.

    Attributes:
        call: the module; DeepSpeed's engine once that has wrapped it.
    """

    def __init__(self, module: GeneratorAndDiscriminator, device: torch.device, document_attention: bool) -> None:
        self.call: Callable[..., Any] = module
        self._parts = module.prepare(device, document_attention)
        self.document_attention = self._parts[1].document_attention

    def constants(self, seq_len: int) -> None:
        """Make, once, the arguments that are the same for all blocks of so many tokens."""
        for part in self._parts:
            part.constants(seq_len)

    def passes(self, inputs: Mapping[str, torch.Tensor], prediction_index: torch.Tensor) -> dict[str, Pass]:
        """Run the module once, and tell of each model what it has computed; as `Forward.passes`."""
        found = self(inputs, prediction_index)
        shown = {name: value for name, value in inputs.items() if name != DRAWS}
        detected = found.detected.index_select(0, prediction_index)
        return {
            MAIN: Pass({**shown, "input_ids": found.tokens}, detected, None),
            GENERATOR: Pass(shown, found.logits, None),
        }

    def states(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the module on padded texts of which nothing is replaced; returns the discriminator's last hidden states.

        Arguments and errors as of `Forward.states`. The generator is called as well, in vain: ZeRO-3 gathers its
        weights in the order of a whole pass.
        """
        ids = inputs["input_ids"]
        nothing = torch.full((len(ids), 1), -1.0, device=ids.device)  # is drawn: each token is shown as it is
        first = torch.arange(len(ids), device=ids.device) * ids.shape[1]
        model = self._parts[1].model
        with showing_states(model) as shown:
            self.call(inputs={**inputs, DRAWS: nothing}, prediction_index=first, documents=None)
        return last_states(model, shown, ids)

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        prediction_index: torch.Tensor | None,
        documents: Documents | None = None,
        score: Score | None = None,
        with_states: bool = False,
    ) -> Replaced:
        """Run the module on B blocks of S tokens; arguments as of `Forward`, but that there are no states to be had."""
        assert not with_states, "nothing teaches two models"
        found = Replaced(*self.call(inputs=inputs, prediction_index=prediction_index, documents=documents))
        if score is not None:
            found.logits = score.function(found.logits, *score.rows)
        return found


def share_embeddings(
    generator: PreTrainedModel, discriminator: PreTrainedModel, share: str, trained: Collection[str] = ()
) -> GeneratorAndDiscriminator:
    """Put the two together.

    Embeddings that are shared are the generator's, unless the discriminator's alone were trained before. A difference
    begins at 0; between two that were trained before, at theirs.

    Args:
        share: as `objective.generator.share`.
        trained: which of MAIN and GENERATOR were trained before.

    Raises:
        UserError: when they do not fit each other.
    """
    from_discriminator = MAIN in trained and GENERATOR not in trained
    if share == EMBEDDINGS:
        _refuse_unequal(*(_embeddings_of(model) for model in (generator, discriminator)))
        giver, taker = (discriminator, generator) if from_discriminator else (generator, discriminator)
        taker.base_model.embeddings = giver.base_model.embeddings
        generator.tie_weights()
    if share == DISENTANGLED:
        theirs: Any = generator.get_input_embeddings()
        own: Any = discriminator.get_input_embeddings()
        _refuse_unequal(theirs, own)
        with torch.no_grad():
            if from_discriminator:
                theirs.weight.copy_(own.weight)
            own.weight.copy_(own.weight - theirs.weight if MAIN in trained else torch.zeros_like(own.weight))
        _add_to(own, theirs)
    return GeneratorAndDiscriminator(generator, discriminator)


def _add_to(difference: nn.Module, table: nn.Module) -> None:
    """Let a table of differences put out what they are differences from as well, without a gradient to that."""
    tables = [table]  # not an attribute: it would become a submodule

    def add(_module: nn.Module, ids: tuple[torch.Tensor, ...], found: torch.Tensor) -> torch.Tensor:
        return found + tables[0](*ids).detach()

    difference.register_forward_hook(add)


def _embeddings_of(model: PreTrainedModel) -> nn.Module:
    found = getattr(model.base_model, "embeddings", None)
    if not isinstance(found, nn.Module) or isinstance(found, nn.Embedding):
        raise UserError(
            f"{type(model).__name__} has its embeddings in several places, so they cannot be shared as a whole.",
            where=f"{_WHERE}={EMBEDDINGS}",
            remedy=f"Set {_WHERE} to {DISENTANGLED} or nothing, or train a model of another type, such as electra.",
        )
    return found


def _refuse_unequal(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = ({name: list(value.shape) for name, value in each.named_parameters()} for each in (one, other))
    if ours != theirs:
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise UserError(
            f"The embeddings of the generator and of the model differ, and cannot be shared: {name} is "
            f"{ours.get(name)} and {theirs.get(name)}.",
            where=_WHERE,
            remedy="Leave fields that they follow from out of objective.generator.overrides (of all but electra "
            f"hidden_size is one), or set {_WHERE}=nothing.",
        )


def trained_names(export: str, trained: Collection[str], embeddings: str) -> dict[str, str]:
    """Map the names of the weights of one of the two models to those that they have in the module.

    Args:
        trained: names of the module's parameters or buffers, each once.
        embeddings: what the names of a model's embeddings begin with; the discriminator has the generator's where it
            has none of its own.
    """
    prefixes = {MAIN: "discriminator.", GENERATOR: "generator."}
    own = {name.removeprefix(prefixes[export]): name for name in trained if name.startswith(prefixes[export])}
    if export == GENERATOR:
        return own
    begin = prefixes[GENERATOR] + embeddings
    shared = {name.removeprefix(prefixes[GENERATOR]): name for name in trained if name.startswith(begin)}
    return {**shared, **own}
