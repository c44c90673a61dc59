"""The registered model as MLflow loads it: rows of (image, prompt) to answers.

MLflow ships this file as code, beside the exported folder and the package meteor_model, and runs it wherever the model
is loaded; so it imports nothing else of the project.
"""

import os
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from meteor_model.answering import DEFAULT_NEW_TOKENS, Answerer, RequestError, read_rows
from meteor_model.loading import load_model_and_processor

__all__ = ["DEFAULT_NEW_TOKENS", "BadRequest", "MeteorPyfunc"]


class BadRequest(MlflowException, ValueError):
    """A request that cannot be served, as MLflow's scoring server understands it: status 400 with the reason.

    What it does not know becomes a 400 with a traceback.
    """

    def __init__(self, reason: str) -> None:
        MlflowException.__init__(self, reason, error_code=INVALID_PARAMETER_VALUE)


class MeteorPyfunc(PythonModel):
    """Answers prompts about images with a METEOR model, greedily, with all three prunings."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load model and processor from the exported folder; on a GPU where there is one.

        MLFLOW_DEFAULT_PREDICTION_DEVICE names another device.
        """
        folder = context.artifacts["model"]
        device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load_model_and_processor(folder)
        self.answerer = Answerer(model.to(torch.device(device)), processor)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """One answer a row.

        Args:
            context: not used; the model is loaded already.
            model_input: rows with `prompt` and `image`, an image file (JPEG, PNG, WebP, GIF) in base64; an empty
                `image` asks the language model alone.
            params: `max_new_tokens`, and `visual_tokens`, the most that stage 3 keeps of a row
                (`meteor_model.answering.Budget`).

        Raises:
            BadRequest: a ValueError that names the row or parameter and what is wrong with it.
        """
        try:
            budget = self.answerer.budget(params or {})
            questions = read_rows(_records(model_input), self.answerer.processor)
            return [answer.text for answer in self.answerer.answer(questions, budget)]
        except RequestError as error:
            raise BadRequest(str(error)) from None


def _records(model_input: Any) -> list[dict[str, Any]]:
    """Rows as mappings: MLflow hands over a DataFrame, direct callers may give a list of mappings."""
    frame = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame(model_input)
    if "prompt" not in frame.columns:
        raise RequestError(f"the input needs a column `prompt` (and `image`), it has {[str(name) for name in frame]}")
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict(orient="records")]


mlflow.models.set_model(MeteorPyfunc())
