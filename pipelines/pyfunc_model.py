"""The registered model as MLflow loads it: rows of (image, prompt) to answers.

MLflow ships this file as code, beside the exported folder and the package meteor_model, and runs it wherever the model
is loaded; so it imports nothing else of the project.
"""

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.images import MAX_BYTES, ImageError
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor

DEFAULT_NEW_TOKENS = 32
ROWS_PER_BATCH = 32


class MeteorPyfunc(PythonModel):
    """Answers prompts about images with a METEOR model, greedily, with all three prunings."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load model and processor from the exported folder; on a GPU where there is one.

        MLFLOW_DEFAULT_PREDICTION_DEVICE names another device.
        """
        folder = context.artifacts["model"]
        device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = MeteorProcessor.from_pretrained(folder)
        model = MeteorForConditionalGeneration.from_pretrained(folder, use_safetensors=True)
        self.model = model.to(torch.device(device)).eval()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """One answer a row.

        Args:
            context: not used; the model is loaded already.
            model_input: rows with `prompt` and `image`, an image file (JPEG, PNG, WebP, GIF) in base64; an empty
                `image` asks the language model alone.
            params: `max_new_tokens`.

        Raises:
            ValueError: naming the row and what is wrong with it.
        """
        new_tokens = int((params or {}).get("max_new_tokens", DEFAULT_NEW_TOKENS))
        longest = self.model.config.text_config.max_position_embeddings
        if not 1 <= new_tokens <= longest:
            raise ValueError(f"max_new_tokens is {new_tokens}; it must be in 1..{longest}")
        rows = [self._parse(index, row) for index, row in enumerate(_records(model_input))]
        answers: list[str] = []
        for start in range(0, len(rows), ROWS_PER_BATCH):
            answers += self._answer(rows[start : start + ROWS_PER_BATCH], new_tokens)
        return answers

    def _parse(self, index: int, row: Mapping[str, Any]) -> tuple[str, list[torch.Tensor]]:
        """A row -> its prompt and its images, none or one (3, S, S) uint8. Raises ValueError that names the row."""
        prompt, encoded = row.get("prompt"), row.get("image")
        if not isinstance(prompt, str):
            raise ValueError(f"row {index}: prompt must be a string, got {type(prompt).__name__}")
        if not isinstance(encoded, str):
            if encoded is not None and not pd.isna(encoded):
                raise ValueError(f"row {index}: image must be a base64 string, got {type(encoded).__name__}")
            encoded = ""
        images = [self._decode(index, encoded)] if encoded else []
        written = prompt.count(IMAGE_PLACEHOLDER)
        if written not in (0, len(images)):
            raise ValueError(
                f"row {index}: the prompt has {written} {IMAGE_PLACEHOLDER} placeholders, the row {len(images)} images"
            )
        if not images and not prompt:
            raise ValueError(f"row {index}: there is neither an image nor a prompt")
        return prompt, images

    def _decode(self, index: int, encoded: str) -> torch.Tensor:
        limit = (MAX_BYTES + 2) // 3 * 4
        if len(encoded) > limit:
            raise ValueError(f"row {index}: image has {len(encoded)} base64 characters, the limit is {limit}")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"row {index}: image is no base64 text: {error}") from None
        try:
            return self.processor.load_image(data)
        except ImageError as error:
            raise ValueError(f"row {index}: image cannot be used: {error}") from None

    @torch.inference_mode()
    def _answer(self, rows: Sequence[tuple[str, list[torch.Tensor]]], new_tokens: int) -> list[str]:
        """One left-padded batch, with and without images, generated greedily."""
        batch = self.processor([prompt for prompt, _ in rows], [images for _, images in rows]).to(self.model.device)
        tokenizer = self.processor.tokenizer
        output_ids = self.model.generate(
            **batch,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        prompt_length = batch["input_ids"].shape[1]
        return [self.processor.decode(ids[prompt_length:]) for ids in output_ids]


def _records(model_input: Any) -> list[dict[str, Any]]:
    """Rows as mappings: MLflow hands over a DataFrame, direct callers may give a list of mappings."""
    frame = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame(model_input)
    if "prompt" not in frame.columns:
        raise ValueError(f"the input needs a column `prompt` (and `image`), it has {[str(name) for name in frame]}")
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict(orient="records")]


mlflow.models.set_model(MeteorPyfunc())
