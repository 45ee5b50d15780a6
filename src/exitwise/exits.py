"""Exits of the image encoder: the features of all of them from one encode, and a model cut at one.

Exit l is the state after l of the encoder's L blocks (0: patch and position embeddings). "Cut after block l" means
that blocks l .. L-1 become the identity; whatever follows the encoder (selection of patches, projector) is the model's
own code. `replay` uses that: it runs the stock `get_image_features` with every block replaced by a look-up.

Departs from the paper in nothing: e_l of Bachu et al. (2025), section 3, is `hidden_states[l]`.

Shapes: N images, S encoder tokens with CLS, P image tokens, D width of the encoder, H width of the language model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from PIL import Image

from .errors import UserError
from .vlm import Vlm

Inputs = torch.Tensor | Mapping[str, torch.Tensor]


@torch.inference_mode()
def encode(vlm: Vlm, inputs: Inputs) -> list[torch.Tensor]:
    """The L+1 states of one full pass of the encoder, each as its blocks give it: (N, S, D), or (S, D) for qwen.

    Args:
        inputs: `vlm.picture(image).inputs`, or pixels (N, 3, height, width) for families that need nothing else.
    """
    states: list[torch.Tensor] = []
    first = vlm.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.append(_given(args, kwargs)), with_kwargs=True
    )
    hooks = [first] + [
        block.register_forward_hook(lambda m, i, out: states.append(_state(out))) for block in vlm.blocks
    ]
    try:
        vlm.family.features(vlm.model, _named(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return states


@torch.inference_mode()
def replay(vlm: Vlm, inputs: Inputs, states: Sequence[torch.Tensor], exit: int) -> list[torch.Tensor]:
    """Image features at `exit`, one (P, H) per image, from the states of `encode`; no block runs.

    A picture in tiles is still one image: given as `vlm.picture(image).inputs`, the list has one entry.

    Args:
        inputs: what was encoded.
    """
    with _cut(vlm, exit, {j: states[min(j + 1, exit)] for j in range(vlm.n_blocks)}):
        found = vlm.family.features(vlm.model, _named(inputs))
    return found if isinstance(inputs, torch.Tensor) else [torch.cat(found)]


def exit_features(vlm: Vlm, image: Image.Image, exits: Sequence[int]) -> dict[int, torch.Tensor]:
    """{exit: (P, H)}: what the language model reads of one image at each exit, from one encode.

    Raises:
        UserError: an exit lies outside 0 .. L.
    """
    for exit in exits:
        _check(vlm, exit)
    inputs = vlm.picture(image).inputs
    states = encode(vlm, inputs)
    return {exit: replay(vlm, inputs, states, exit)[0] for exit in exits}


@contextmanager
def exit_at(vlm: Vlm, exit: int) -> Iterator[Vlm]:
    """Within it the model is the one whose encoder stops after `exit` blocks, `generate` included.

    Raises:
        UserError: the exit lies outside 0 .. L.
    """
    _check(vlm, exit)
    default = exit == vlm.default_exit
    with nullcontext() if default else _cut(vlm, exit, dict.fromkeys(range(exit, vlm.n_blocks))):
        yield vlm


def _check(vlm: Vlm, exit: int) -> None:
    if not 0 <= exit <= vlm.n_blocks:
        raise UserError(
            f"exit {exit} is not there: {vlm.name} has exits 0 to {vlm.n_blocks} (default {vlm.default_exit})"
        )


def _named(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {"pixel_values": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)


def _given(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden state that a block is called with."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["hidden_state"]


def _state(output):
    """The hidden state in what a block returns: a tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _cut(vlm: Vlm, exit: int, values: dict[int, torch.Tensor | None]) -> Iterator[None]:
    """The blocks of `values` replaced, and the family's settings for `exit` made."""
    with _blocks_return(vlm, values), ExitStack() as settings:
        for holder, name, value in vlm.family.settings(vlm.model, exit):
            settings.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        yield


@contextmanager
def _blocks_return(vlm: Vlm, values: dict[int, torch.Tensor | None]) -> Iterator[None]:
    """Replaces `forward` of the given blocks: return the value, or the block's input where the value is None.

    The instance's attribute is set, so hooks on the class (transformers' capture of hidden states) still fire.
    """

    def forward_for(value):
        def forward(*args, **kwargs):
            found = _given(args, kwargs) if value is None else value
            return (found,) if vlm.family.block_returns_tuple else found

        return forward

    before = {index: vars(vlm.blocks[index]).get("forward") for index in values}  # set where exits are nested
    for index, value in values.items():
        vlm.blocks[index].forward = forward_for(value)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for index, forward in before.items():
            if forward is None:
                del vlm.blocks[index].forward
            else:
                vlm.blocks[index].forward = forward
