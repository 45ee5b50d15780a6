"""Types of the transformers objects in a `Vlm`, for annotations: transformers itself types their attributes loosely."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self


class ImageOutput(Protocol):
    """The output of `get_image_features`."""

    pooler_output: "Sequence[torch.Tensor] | torch.Tensor"
    last_hidden_state: "torch.Tensor"
    deepstack_features: "Sequence[torch.Tensor]"


if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import (
        BaseImageProcessor,
        BatchFeature,
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    class StockModel(PreTrainedModel):
        """A `...ForConditionalGeneration` model; its submodules have the names of their family."""

        generation_config: GenerationConfig
        prepare_inputs_for_generation: Callable[..., dict[str, object]]

        def generate(self, **inputs: object) -> torch.Tensor: ...
        def get_image_features(self, **inputs: object) -> "ImageOutput": ...
        def to(self, *args: object) -> Self: ...  # type: ignore[override]
        def get_decoder(self) -> torch.nn.Module: ...
        def __getattr__(self, name: str) -> Any: ...

    class StockTokenizer(PreTrainedTokenizerBase):
        """A tokenizer, as it is called with one text or one id at a time."""

        def decode(self, token_ids: object, skip_special_tokens: bool = False, **kwargs: object) -> str: ...
        def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str: ...  # type: ignore[override]

    class StockProcessor(Protocol):
        """The processor of such a model: image processor, tokenizer and chat template."""

        tokenizer: StockTokenizer
        image_processor: BaseImageProcessor
        chat_template: str | None

        def __call__(self, **inputs: object) -> BatchFeature: ...
        def apply_chat_template(
            self, conversation: Sequence[Mapping[str, object]], *, add_generation_prompt: bool
        ) -> str: ...
        def save_pretrained(self, save_directory: Path) -> object: ...
