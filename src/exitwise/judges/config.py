"""Options of the judges that are models."""

from dataclasses import dataclass

from ..errors import UserError
from .guards import GUARDS

RUBRIC = "rubric"
"""Name of the judge that is any chat model with the rubric of rubric.py."""


@dataclass(frozen=True)
class Judging:
    """Options of judges that are models; the string matcher needs none."""

    judge_model: tuple[str, ...] = ()
    """Folder or hub id of the judge's weights, or its name at the endpoint; JUDGE=MODEL if --judge names several."""
    judge_endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1. Its key is read from the environment
    variable EXITWISE_JUDGE_API_KEY or OPENAI_API_KEY."""
    judge_batch_size: int = 16
    """Number of questions in one batch of the judge."""

    def model_of(self, name: str) -> str:
        """The model to use for a judge. Raises UserError where none is given, or more than one."""
        named = [value.partition("=")[2] for value in self.judge_model if value.partition("=")[0] == name]
        found = named or [value for value in self.judge_model if value.partition("=")[0] not in (*GUARDS, RUBRIC)]
        if len(found) > 1:
            raise UserError(f"--judge-model names {len(found)} models for {name}; give {name}=MODEL, once")
        if found:
            return found[0]
        if self.judge_endpoint or name == RUBRIC:
            what = "its name at the endpoint" if self.judge_endpoint else "a folder or hub id of a chat model"
            raise UserError(f"the judge {name} needs --judge-model, {what}")
        return GUARDS[name].hub
