"""Loads the reward adapter into a PEFT model, switches it on alone, and restores the model's state afterwards."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError
from torch import nn

from ..errors import UserError
from ..model.loading import first_line
from ..model.quiet import quiet

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

ADAPTER = "reward"
"""Name of the reward model's adapter in a PEFT model."""


def tuner_of(peft_model: "PeftModel") -> "BaseTuner":
    """The module that switches adapter layers on and off."""
    return cast("BaseTuner", peft_model.base_model)


class AdapterState:
    """The state of a PEFT model that loading or switching adapters changes; `restore` puts it back.

    Raises:
        UserError: an adapter is merged, so that none can be switched.
    """

    def __init__(self, peft_model: "PeftModel"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in peft_model.modules() if isinstance(m, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise UserError("an adapter is merged into the model, so no other can be switched on; unmerge it first")
        self.model, self.active = peft_model, peft_model.active_adapter
        self.disabled = any(layer.disable_adapters for layer in layers)
        self.training = [m for m in peft_model.modules() if m.training]
        self.grads = [(p, p.requires_grad) for p in peft_model.parameters()]

    def restore(self) -> None:
        self.model.set_adapter(self.active)
        if self.disabled:
            tuner_of(self.model).disable_adapter_layers()
        for module in self.training:
            module.training = True
        for parameter, flag in self.grads:
            parameter.requires_grad_(flag)


@contextmanager
def only_adapter(peft_model: "PeftModel", name: str) -> Iterator[None]:
    """Within the block the model computes with this adapter alone, in evaluation mode.

    Afterwards the active adapter, switched-off adapters, training mode and `requires_grad` are what they were (PEFT's
    `set_adapter` sets `requires_grad` on whatever it switches to).
    """
    before = AdapterState(peft_model)
    try:
        tuner_of(peft_model).enable_adapter_layers()
        peft_model.set_adapter(name, inference_mode=True)
        for module in before.training:
            module.training = False
        yield
    finally:
        before.restore()


def load_adapter(peft_model: "PeftModel", folder: Path) -> None:
    """Loads the adapter of `folder` as "reward" and leaves the model's state as it was.

    Raises:
        UserError: a weight is missing, unknown or of another shape.
    """
    before = AdapterState(peft_model)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ADAPTER in peft_model.peft_config and peft_model.active_adapter != ADAPTER:
                peft_model.delete_adapter(ADAPTER)
            result = peft_model.load_adapter(str(folder), ADAPTER)
        strange = [*result.missing_keys, *result.unexpected_keys]
        if strange:  # PEFT would go on with what it initialised
            raise ValueError(f"{len(strange)} of its tensors have no place here, first {strange[0]}")
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the reward adapter {folder} does not fit this model ({first_line(error)})") from error
    before.restore()


def with_idle_adapter(model: nn.Module, folder: Path) -> "PeftModel":
    """A PeftModel whose only adapter is the reward model's, switched off, so that `model` computes as before.

    Raises:
        UserError: the model has adapters already.
    """
    from peft import PeftConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("the model has adapters already; give load_reward its peft_model, which holds them")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)), adapter_name=ADAPTER)
    tuner_of(peft_model).disable_adapter_layers()
    return peft_model.eval().requires_grad_(False)
