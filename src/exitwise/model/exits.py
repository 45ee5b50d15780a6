"""Exits of the image encoder: the features of all of them from one encode, and a model cut at one.

Exit l is the state after l of the encoder's L blocks (0: patch and position embeddings). "Cut after block l" means
that blocks l .. L-1 become the identity; whatever follows the encoder (selection of patches, projector) is the model's
own code. `replay` uses that: it runs the stock `get_image_features` with every block replaced by a look-up, and
leaves out what leads to the first.

For models that use several states see docs/explanation/icet.md.

An exit may also be a set of layers (run.exit.Exit). A connector that takes several gets these; for one that takes
one, their mean is what the encoder ends with (averaged as DenseConnector does within its groups of layers, Yao et al.
2024, but nothing is concatenated: the projector is the model's own).

Departs from the paper in nothing: e_l of Bachu et al. (2025), section 3, is `hidden_states[l]`.

Shapes: N images, S encoder tokens with CLS, P image tokens, D width of the encoder, H width of the language model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import nn

from ..errors import UserError
from ..run.exit import Exit
from .families import Family
from .processing import Picture

if TYPE_CHECKING:
    from .types import StockModel

EncoderInputs = torch.Tensor | Mapping[str, torch.Tensor]
Forward = Callable[..., torch.Tensor | tuple[torch.Tensor]]


class ExitModel(Protocol):
    """The attributes of a `Vlm` that its exits depend on."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> "StockModel": ...
    @property
    def blocks(self) -> nn.ModuleList: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def default_exit(self) -> int: ...
    @property
    def family(self) -> Family: ...
    @property
    def takes_layers(self) -> int: ...
    def picture(self, image: Image.Image) -> Picture: ...


class States(list[torch.Tensor]):
    """The L+1 states of one pass of the encoder, each as its blocks return it: (N, S, D), or (S, D) for qwen.

    Attributes:
        embedders: modules that returned a tensor of state 0's shape before the first block ran; `replay` skips them.
    """

    embedders: Sequence[nn.Module] = ()


@torch.inference_mode()
def encode(vlm: ExitModel, inputs: EncoderInputs) -> States:
    """Runs the whole encoder once and returns all its states.

    Args:
        inputs: `vlm.picture(image).inputs`, or pixels (N, 3, height, width) for families that need nothing else.
    """
    states = States()
    early: list[tuple[nn.Module, torch.Size | None]] = []

    def note(module: nn.Module, given: object, out: object) -> None:
        if not states:
            early.append((module, getattr(out, "shape", None)))

    first = vlm.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.append(_given(args, kwargs)), with_kwargs=True
    )
    hooks = [first] + [
        block.register_forward_hook(lambda m, i, out: states.append(_state(out))) for block in vlm.blocks
    ]
    hooks += [module.register_forward_hook(note) for module in _outside(vlm)]
    try:
        vlm.family.features(vlm.model, _named(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    states.embedders = [module for module, shape in early if shape == states[0].shape]
    return states


@torch.inference_mode()
def replay(
    vlm: ExitModel, inputs: EncoderInputs, states: Sequence[torch.Tensor], exit: Exit | int
) -> list[torch.Tensor]:
    """Image features at `exit`, one (P, H) per image, from the states of `encode`; no block runs.

    A picture in tiles is still one image: given as `vlm.picture(image).inputs`, the list has one entry.

    Args:
        inputs: those of `encode`.
    """
    exit = Exit.of(exit)
    layers = exit.layers
    if vlm.takes_layers and exit.is_set:
        cut = _selected(vlm, layers, {j: states[j + 1] for j in range(vlm.n_blocks)})
    elif exit.is_set:
        mean = torch.stack([states[layer] for layer in layers]).mean(dim=0)
        cut = _cut(vlm, layers[-1], dict.fromkeys(range(vlm.n_blocks), mean))
    else:
        cut = _cut(vlm, exit.deepest, {j: states[min(j + 1, exit.deepest)] for j in range(vlm.n_blocks)})
    known = states.embedders if isinstance(states, States) else ()
    with cut, _embedded(vlm, states[0], known):
        found = vlm.family.features(vlm.model, _named(inputs))
    return found if isinstance(inputs, torch.Tensor) else [torch.cat(found)]


def exit_features(vlm: ExitModel, image: Image.Image, exits: Sequence[Exit | int]) -> dict[Exit, torch.Tensor]:
    """{exit: (P, H)}: the image features that the language model reads at each exit, from one encode.

    Raises:
        UserError: an exit lies outside 0 .. L, fuses layers where the model cannot, or the model cannot take an image
            of this shape.
    """
    wanted = [check(vlm, exit) for exit in exits]
    inputs = vlm.picture(image).inputs
    try:
        states = encode(vlm, inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"the encoder of {vlm.name} cannot take an image of {image.width} x {image.height} pixels "
            f"({str(error).splitlines()[0][:200]}); use an image with another size or aspect ratio"
        ) from error
    return {exit: replay(vlm, inputs, states, exit)[0] for exit in wanted}


@contextmanager
def exit_at(vlm: ExitModel, exit: Exit | int | str) -> Iterator[None]:
    """Within it the encoder of the model stops after `exit` blocks, for `forward` and `generate` alike.

    Raises:
        UserError: the exit lies outside 0 .. L.
    """
    exit = check(vlm, exit)
    cut: AbstractContextManager[None]
    if exit == vlm.default_exit:
        cut = nullcontext()
    elif vlm.takes_layers and exit.is_set:
        cut = _selected(vlm, exit.layers, {})
    elif exit.is_set:
        cut = _averaging(vlm, exit.layers)
    else:
        cut = _cut(vlm, exit.deepest, dict.fromkeys(range(exit.deepest, vlm.n_blocks)))
    with cut:
        yield


def check(vlm: ExitModel, exit: Exit | int | str) -> Exit:
    """The exit as a value.

    Raises:
        UserError: it lies outside 0 .. L, or fuses layers that the model cannot fuse.
    """
    there = f"{vlm.name} has exits 0 to {vlm.n_blocks} (default {vlm.default_exit})"
    try:
        found = Exit.of(exit)
    except ValueError:
        raise UserError(f"exit {exit} does not exist: {there}") from None
    if found.deepest > vlm.n_blocks:
        raise UserError(f"exit {found} does not exist: {there}")
    if found.is_set and vlm.takes_layers and len(found.layers) != vlm.takes_layers:
        raise UserError(
            f"exit {found} has {len(found.layers)} layers, but the connector of {vlm.name} takes {vlm.takes_layers}"
        )
    if found.is_set and not vlm.family.averages:
        raise UserError(
            f"exit {found} fuses layers, and {vlm.name} joins several layers itself; give exits of one layer"
        )
    return found


def _named(inputs: EncoderInputs) -> dict[str, torch.Tensor]:
    return {"pixel_values": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)


def _given(args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The hidden state that a block is called with."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["hidden_state"]


def _state(output: torch.Tensor | tuple[torch.Tensor]) -> torch.Tensor:
    """The hidden state that a block returns: a tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _cut(vlm: ExitModel, exit: int, values: dict[int, torch.Tensor | None]) -> Iterator[None]:
    """Replaces the blocks of `values` and applies the family's settings for `exit`."""
    with _blocks_return(vlm, values), ExitStack() as settings:
        for holder, name, value in vlm.family.settings(vlm.model, exit):
            settings.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        yield


@contextmanager
def _selected(vlm: ExitModel, layers: Sequence[int], values: dict[int, torch.Tensor | None]) -> Iterator[None]:
    """The connector takes these layers; the blocks of `values` return their value."""
    config, before = vlm.model.config, vlm.model.config.vision_feature_layer
    config.vision_feature_layer = list(layers)
    try:
        with _blocks_return(vlm, values):
            yield
    finally:
        config.vision_feature_layer = before


@contextmanager
def _averaging(vlm: ExitModel, layers: Sequence[int]) -> Iterator[None]:
    """Blocks run up to the deepest of the layers; the last state is the mean of the layers' states."""
    states: dict[int, torch.Tensor] = {}
    last = vlm.n_blocks - 1

    def forward_for(index: int, run: Forward) -> Forward:
        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor]:
            states[index] = _given(args, kwargs)
            states[index + 1] = _state(run(*args, **kwargs)) if index < layers[-1] else states[index]
            found = states[index + 1]
            if index == last:
                found = torch.stack([states[layer] for layer in layers]).mean(dim=0)
                states.clear()
            return (found,) if vlm.family.block_returns_tuple else found

        return forward

    forwards = [(block, forward_for(i, block.forward)) for i, block in enumerate(vlm.blocks)]
    with _cut(vlm, layers[-1], {}), _forwards(forwards):
        yield


@contextmanager
def _blocks_return(vlm: ExitModel, values: dict[int, torch.Tensor | None]) -> Iterator[None]:
    """Replaces `forward` of the given blocks: return the value, or the block's input where the value is None.

    The instance's attribute is set, so hooks on the class (transformers' capture of hidden states) still fire.
    """

    def forward_for(value: torch.Tensor | None) -> Forward:
        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor]:
            found = _given(args, kwargs) if value is None else value
            return (found,) if vlm.family.block_returns_tuple else found

        return forward

    with _forwards([(vlm.blocks[index], forward_for(value)) for index, value in values.items()]):
        yield


@contextmanager
def _embedded(vlm: ExitModel, state: torch.Tensor, known: Sequence[nn.Module]) -> Iterator[None]:
    """Gives state 0 to the first block and skips what computes it, which would be most of the cost of a replay.

    The `known` embedders return the state; other convolutions before the blocks return zeros, which nothing reads.
    """
    begun: list[bool] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, torch.Tensor]) -> tuple[tuple, dict[str, torch.Tensor]]:
        begun.append(True)
        if args:
            return (state, *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else "hidden_state"
        return args, kwargs | {name: state}

    def ready(*args: object, **kwargs: object) -> torch.Tensor:
        return state

    def forward_for(convolution: nn.Conv2d | nn.Conv3d) -> Forward:
        run = convolution.forward

        def forward(given: torch.Tensor) -> torch.Tensor:
            if begun:
                return run(given)
            shape = convolution._conv_forward(given.to("meta"), convolution.weight.to("meta"), None).shape
            return given.new_zeros(()).expand(shape)

        return forward

    convolutions = [m for m in _outside(vlm) if isinstance(m, (nn.Conv2d, nn.Conv3d)) and m not in known]
    forwards: list[tuple[nn.Module, Forward]] = [(module, ready) for module in known]
    forwards += [(module, forward_for(module)) for module in convolutions]
    hook = vlm.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _forwards(forwards):
            yield
    finally:
        hook.remove()


def _outside(vlm: ExitModel) -> list[nn.Module]:
    """All modules of the model except its blocks and the modules in them."""
    inside = {module for block in vlm.blocks for module in block.modules()}
    return [module for module in vlm.model.modules() if module not in inside]


@contextmanager
def _forwards(forwards: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Replaces `forward` of modules, and restores it afterwards."""
    before = [vars(module).get("forward") for module, _ in forwards]  # set where exits are nested
    for module, forward in forwards:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for (module, _), previous in zip(forwards, before, strict=True):
            if previous is None:
                del module.forward
            else:
                vars(module)["forward"] = previous
