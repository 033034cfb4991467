"""One causal LM cut in three: bottom and top for the client, the backbone for the server.

The segments share the parameters of the model they were cut from. That model may be empty (on the meta device): then
`fill` gives one side's tensors memory and values, and the other side's never exist.

Shapes: B micro-batch, S sequence, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitfl.errors import ModelError
from splitfl.models.anatomy import Anatomy, anatomy_of, base_of, config_for, view_of
from splitfl.models.deferred import deferrable_head
from splitfl.models.loss import Head, Scores, chunked_loss, chunked_scores, head_of, plain_scores
from splitfl.models.remote_cache import BackboneCache
from splitfl.models.stand_in import RemoteBlocks, StandIn
from splitfl.telemetry.units import counted

Side = Literal["client", "server"]


class Bottom(nn.Module):
    """Token ids to activations: the embedding and the first blocks."""

    def __init__(self, view: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__()
        self.base = base_of(view, anatomy)

    def forward(self, input_ids_BS: Tensor, mask_BS: Tensor | None, position_ids_BS: Tensor | None = None) -> Tensor:
        """Return activations BSD in the model's dtype; `mask_BS` is 1 where a row has a token, None for full rows.

        Positions count from 0 in each row unless given (see `layout.Layout`), here and in the other segments.
        """
        return self.base(
            input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False, **_positions(position_ids_BS)
        ).last_hidden_state


class Backbone(nn.Module):
    """Activations to activations: the blocks in the middle."""

    def __init__(self, view: PreTrainedModel, cut: "Cut") -> None:
        super().__init__()
        self.base = base_of(view, cut.anatomy)
        self.cut = cut

    def forward(self, hidden_BSD: Tensor, mask_BS: Tensor | None, position_ids_BS: Tensor | None = None) -> Tensor:
        """Return activations BSD."""
        return self.base(
            inputs_embeds=hidden_BSD, attention_mask=mask_BS, use_cache=False, **_positions(position_ids_BS)
        ).last_hidden_state

    def new_cache(self) -> BackboneCache:
        """Return an empty cache for `decode`; raise `ModelError` for a family that keeps more than keys and values."""
        config: Any = self.base.config
        return BackboneCache(config.get_text_config())

    def decode(
        self, cache: BackboneCache, hidden_BSD: Tensor, lengths_B: tuple[int, ...], beams_B: tuple[int, ...]
    ) -> Tensor:
        """Return activations BSD of new positions, after the positions in `cache` (see `RemoteCache.decode`)."""
        cache.reorder(beams_B)
        mask_BS, position_ids_BS = cache.grown(hidden_BSD.shape[1], lengths_B)
        device = hidden_BSD.device
        return self.base(
            inputs_embeds=hidden_BSD,
            attention_mask=None if mask_BS is None else mask_BS.to(device),
            past_key_values=cache.keys_and_values,
            use_cache=True,
            # without padding the library counts positions from the cache
            **_positions(None if position_ids_BS is None else position_ids_BS.to(device)),
        ).last_hidden_state


class Top(nn.Module):
    """Activations to logits: the last blocks, the final norm and the LM head."""

    def __init__(self, view: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__()
        self.view = view
        self._base_path = anatomy.base_prefix()
        self._head: Head | None = None

    def chunk_the_loss(self) -> bool:
        """Let `loss` do without logits from now on, where that means the same; say whether it does."""
        self._head = head_of(self.view.eval(), self.base)
        return self._head is not None

    def deferrable_head(self) -> Head | None:
        """Return the head of a model that can put its logits off (see `defer_logits`), None if it cannot."""
        return deferrable_head(self.view.eval(), self.base)

    @property
    def base(self) -> nn.Module:
        """The last blocks and the final norm, without the LM head."""
        return self.view.get_submodule(self._base_path)

    def forward(self, hidden_BSD: Tensor, mask_BS: Tensor | None, position_ids_BS: Tensor | None = None) -> Tensor:
        """Return logits BSV."""
        return self.view(
            inputs_embeds=hidden_BSD, attention_mask=mask_BS, use_cache=False, **_positions(position_ids_BS)
        ).logits

    def loss(
        self,
        hidden_BSD: Tensor,
        mask_BS: Tensor | None,
        labels_BS: Tensor,
        num_items: int | None,
        position_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the model's own loss: the sum over label tokens (-100 is none) over `num_items`, or their mean."""
        if self._head is not None:
            last = self.base(
                inputs_embeds=hidden_BSD, attention_mask=mask_BS, use_cache=False, **_positions(position_ids_BS)
            ).last_hidden_state
            return chunked_loss(self._head, last, labels_BS, num_items)
        return self._library_loss(self(hidden_BSD, mask_BS, position_ids_BS), labels_BS, num_items)

    def scores(self, hidden_BSD: Tensor, mask_BS: Tensor | None, labels_BS: Tensor) -> Scores:
        """Return how well each label is predicted; their loss is what `loss` gives for 1 item."""
        if self._head is not None:
            last = self.base(inputs_embeds=hidden_BSD, attention_mask=mask_BS, use_cache=False).last_hidden_state
            return chunked_scores(self._head, last, labels_BS)
        logits_BSV = self(hidden_BSD, mask_BS)
        return plain_scores(logits_BSV, labels_BS, self._library_loss(logits_BSV, labels_BS, 1))

    def _library_loss(self, logits_BSV: Tensor, labels_BS: Tensor, num_items: int | None) -> Tensor:
        loss: Tensor = self.view.loss_function(
            logits=logits_BSV,
            labels=labels_BS,
            vocab_size=self.view.config.get_text_config().vocab_size,
            num_items_in_batch=num_items,
        )
        return loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A causal LM, real or empty, and where it is cut."""

    whole: PreTrainedModel
    anatomy: Anatomy
    bottom_layers: int
    top_layers: int
    blocks_give_tuples: bool = False
    """Whether the library's code takes the first of what a block returns (bloom, falcon, gptj, mpt, gpt_neo, ...)."""

    @classmethod
    def of(cls, model: PreTrainedModel, *, bottom_layers: int, top_layers: int) -> "Cut":
        """Cut `model`, sharing its parameters; raise `ModelError` when it cannot be cut there."""
        anatomy = anatomy_of(model)
        if min(bottom_layers, top_layers) < 0 or bottom_layers + top_layers >= anatomy.num_blocks:
            raise ModelError(
                f"{model.config.model_type} has {counted(anatomy.num_blocks, 'block')}: bottom_layers + top_layers ="
                f" {bottom_layers} + {top_layers} must leave at least one to the backbone"
            )
        cut = cls(whole=model, anatomy=anatomy, bottom_layers=bottom_layers, top_layers=top_layers)
        try:
            cut._refuse_unknown_ends()
        except ModelError as error:
            return cut._with_tuples(error)
        return cut

    def _with_tuples(self, refusal: ModelError) -> "Cut":
        """Return the cut for blocks that give tuples, or raise why it was refused with blocks that give tensors."""
        cut = replace(self, blocks_give_tuples=True)
        try:
            cut._refuse_unknown_ends()
        except ModelError:
            raise refusal from None
        return cut

    @property
    def is_empty(self) -> bool:
        """Whether the model has shapes but no memory."""
        return any(parameter.is_meta for parameter in self.whole.parameters())

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks of the whole model, in order."""
        return list(self.whole.get_submodule(self.anatomy.blocks_path).children())

    def layers_of(self, segment: Literal["bottom", "backbone", "top"]) -> range:
        """Return the numbers of the blocks in a segment."""
        first_top = self.anatomy.num_blocks - self.top_layers
        return {
            "bottom": range(self.bottom_layers),
            "backbone": range(self.bottom_layers, first_top),
            "top": range(first_top, self.anatomy.num_blocks),
        }[segment]

    def bottom(self) -> Bottom:
        """Return the first segment."""
        return Bottom(self._view(self.layers_of("bottom"), owns_input=True, owns_output=False), self.anatomy)

    def backbone(self) -> Backbone:
        """Return the middle segment."""
        return Backbone(self._view(self.layers_of("backbone"), owns_input=False, owns_output=False), self)

    def top(self) -> Top:
        """Return the last segment."""
        return Top(self._view(self.layers_of("top"), owns_input=False, owns_output=True), self.anatomy)

    def client_model(self, remote: RemoteBlocks, kind: Callable[..., StandIn] = StandIn) -> PreTrainedModel:
        """Return a model of the original class whose middle is a stand-in, of this kind, that calls `remote`."""
        blocks, bottom, top = self.blocks, self.layers_of("bottom"), self.layers_of("top")
        stand_in = kind(remote, self.bottom_layers, gives_tuple=self.blocks_give_tuples).train(self.whole.training)
        model = view_of(
            self.whole,
            self.anatomy,
            [*(blocks[i] for i in bottom), stand_in, *(blocks[i] for i in top)],
            config_for(self.whole.config, [*bottom, self.bottom_layers, *top]),
            owns_input=True,
            owns_output=True,
        )
        stand_in.watch(model.get_submodule(".".join(self.anatomy.owner_path)))
        if model.generation_config is not None:
            # a view's own copy, so that the whole model's stays as it was
            model.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
        return model

    def side_of(self, name: str) -> Side:
        """Tell who holds a parameter, by its name in the whole model."""
        layer = self.layer_of(name)
        return "server" if layer is not None and layer in self.layers_of("backbone") else "client"

    def layer_of(self, name: str) -> int | None:
        """Return the number of the block a parameter belongs to, None for the ends."""
        prefix = self.anatomy.blocks_path + "."
        return int(name.removeprefix(prefix).split(".", 1)[0]) if name.startswith(prefix) else None

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) in the whole model's order, tied parameters once, under their first name."""
        return self.whole.named_parameters()

    def trainable(self, side: Side | None = None) -> dict[str, nn.Parameter]:
        """Return what trains, of one side or of both, in the whole model's order."""
        return {
            name: parameter
            for name, parameter in self.parameters()
            if parameter.requires_grad and side in (None, self.side_of(name))
        }

    def fill(
        self,
        side: Side,
        read: Callable[[Sequence[str], Tensor], None],
        device: torch.device,
        elsewhere: Mapping[Tensor, torch.device] = MappingProxyType({}),
    ) -> None:
        """Give one side's parameters and buffers memory and values, on `device` unless they are to be `elsewhere`.

        `read` gets all names of a tensor and the memory to write its values into. Buffers that no checkpoint holds
        (rotary frequencies, causal masks) are computed as transformers does after loading through an empty model.
        """
        segments = [self.bottom(), self.top()] if side == "client" else [self.backbone()]
        names = self._all_names()
        filled: dict[nn.Parameter, nn.Parameter] = {}
        for module in (*_modules(segments), *self._way_to_blocks()):
            # views copy modules and share their tensors, so it is these that have a place
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            place = next((elsewhere[tensor] for tensor in own if tensor in elsewhere), device)
            for key, parameter in module._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                if parameter not in filled:  # a tied one comes by twice and stays one
                    filled[parameter] = _with_memory(parameter, place)
                    read(names[parameter], filled[parameter].data)
                module._parameters[key] = filled[parameter]
            held = {key: names[buffer] for key, buffer in module._buffers.items() if buffer in names}
            self._compute_buffers(module, place)
            for key, known_as in held.items():
                read(known_as, module._buffers[key])  # type: ignore[arg-type]

    def _way_to_blocks(self) -> list[nn.Module]:
        """Return the whole model's modules that views copy: what they hold themselves is to be in later views too."""
        path = self.anatomy.owner_path
        return [self.whole.get_submodule(".".join(path[:length])) for length in range(len(path) + 1)]

    def _all_names(self) -> dict[Tensor, list[str]]:
        """Return the names of each tensor a checkpoint holds: tied parameters have several."""
        stored = set(self.whole.state_dict(keep_vars=True))
        names: dict[Tensor, list[str]] = {}
        for name, parameter in self.whole.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        for name, buffer in self.whole.named_buffers():
            if name in stored:
                names[buffer] = [name]
        return names

    def tensors_of(self, side: Side) -> dict[str, tuple[list[str], Tensor]]:
        """Return what one side holds of a checkpoint: first name -> (all names, tensor), in the whole model's order."""
        return {
            names[0]: (names, tensor) for tensor, names in self._all_names().items() if self.side_of(names[0]) == side
        }

    def _compute_buffers(self, module: nn.Module, device: torch.device) -> None:
        empty = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not empty:
            return
        for key in empty:
            module._buffers[key] = _unset_like(module._buffers[key], device)  # type: ignore[arg-type]
        self.whole._init_weights(module)
        for key in empty:
            if _is_unset(module._buffers[key]):  # type: ignore[arg-type]
                raise ModelError(
                    f"{self.whole.config.model_type} cannot be loaded in parts: transformers does not compute"
                    f" {type(module).__name__}.{key} after loading through an empty model"
                )

    def _view(self, layers: Sequence[int], *, owns_input: bool, owns_output: bool) -> PreTrainedModel:
        blocks = self.blocks
        return view_of(
            self.whole,
            self.anatomy,
            [blocks[layer] for layer in layers],
            config_for(self.whole.config, layers),
            owns_input=owns_input,
            owns_output=owns_output,
        )

    def _refuse_unknown_ends(self) -> None:
        """Run a backbone whose blocks hand on what they get: anything it changes is an end we do not know.

        Families scale, normalise or project around their blocks in code that no module list shows. A cut that missed it
        would train wrongly and say nothing.
        """
        kind = self.whole.config.model_type
        middle = self.layers_of("backbone")
        through = [_PassThrough(gives_tuple=self.blocks_give_tuples) for _ in range(2)]
        config = config_for(self.whole.config, [middle[0], middle[-1]])
        view = view_of(self.whole, self.anatomy, through, config, owns_input=False, owns_output=False)
        owner = view.get_submodule(".".join(self.anatomy.owner_path))
        ends = {name: _PassThrough() for name in self.anatomy.output_names if owner._modules[name] is not None}
        owner._modules.update(ends)
        device = torch.device("cpu") if self.is_empty else self.whole.device
        for module in _modules([view]):
            self._compute_buffers(module, device)
        width = self.whole.config.get_text_config().hidden_size
        given_BSD = torch.linspace(-3, 3, 3 * width, device=device, dtype=self.whole.dtype).reshape(1, 3, width)
        try:
            with torch.no_grad():
                got_BSD = base_of(view, self.anatomy)(
                    inputs_embeds=given_BSD.clone(), use_cache=False
                ).last_hidden_state
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
            # the library's own code, given blocks that return a tensor as most families' do
            raise ModelError(
                f"{kind} cannot be cut: its blocks take or give more than activations ({error})"
            ) from error
        if [block.calls for block in through] != [1, 1]:
            raise ModelError(f"{kind} cannot be cut: it does not run each of its blocks once, in order")
        if any(end.calls != 1 for end in ends.values()):
            raise ModelError(f"{kind} cannot be cut: what follows its blocks is also used before them or between them")
        if not isinstance(got_BSD, Tensor) or not torch.equal(got_BSD, given_BSD):
            raise ModelError(
                f"{kind} cannot be cut: it changes activations outside its blocks in a way splitfl does not know"
            )


class _PassThrough(nn.Module):
    """A block that hands on what it gets and counts how often."""

    def __init__(self, *, gives_tuple: bool = False) -> None:
        super().__init__()
        self._gives_tuple = gives_tuple
        self.calls = 0

    def forward(self, hidden_BSD: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        self.calls += 1
        return (hidden_BSD,) if self._gives_tuple else hidden_BSD


def mask_of(
    lengths_B: Sequence[int], length: int, side: Literal["left", "right"], device: torch.device
) -> Tensor | None:
    """Return the int64 mask BS of rows padded to `length` on one side, None when no row is padded."""
    if all(row == length for row in lengths_B):
        return None
    positions_S = torch.arange(length, device=device)
    lengths_B1 = torch.tensor(lengths_B, device=device).unsqueeze(1)
    if side == "left":
        return (positions_S >= length - lengths_B1).long()
    return (positions_S < lengths_B1).long()


def _positions(position_ids_BS: Tensor | None) -> dict[str, Tensor]:
    """Name positions only where there are any: some families take none."""
    return {} if position_ids_BS is None else {"position_ids": position_ids_BS}


def _with_memory(empty: nn.Parameter, device: torch.device) -> nn.Parameter:
    full = nn.Parameter(torch.empty_like(empty, device=device), requires_grad=empty.requires_grad)
    full._is_hf_initialized = True  # type: ignore[attr-defined]  # tells transformers to leave it alone
    return full


def _unset_like(empty: Tensor, device: torch.device) -> Tensor:
    """Return memory for a buffer with a mark in it that no computed buffer holds: NaN, or the least integer."""
    full = torch.empty_like(empty, device=device)
    if full.dtype == torch.bool:
        return full
    return full.fill_(float("nan") if full.is_floating_point() else torch.iinfo(full.dtype).min)


def _is_unset(buffer: Tensor) -> bool:
    """Tell whether a buffer still holds the mark of `_unset_like`; bools have none."""
    if buffer.dtype == torch.bool or buffer.numel() == 0:
        return False
    mark = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min
    return bool(mark.any())


def _modules(roots: Iterable[nn.Module]) -> Iterable[nn.Module]:
    seen: set[int] = set()
    for root in roots:
        for module in root.modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield module
