"""Pictures of what all stages keep of held-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice

from PIL import Image

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.prompts import Prompt
from meteor_model.visualize import explain_kept
from pipelines.evaluation.questions import Question


def draw_questions(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Sequence[Question], count: int
) -> Iterator[tuple[str, Image.Image]]:
    """File name and picture of the kept tokens, stage by stage, for the first `count` samples with one image.

    Two different questions of a sample are drawn, each as it stands in its conversation.
    """
    by_sample = (list(group) for _, group in groupby(questions, key=lambda question: question.sample))
    single = (group for group in by_sample if all(len(question.images) == 1 for question in group))
    for group in islice(single, count):
        prompts: dict[str, Prompt] = {}
        for question in group if model.new_cache() is not None else []:
            if question.text:
                prompt = Prompt.of(question.text, question.turns, {"add_generation_prompt": True})
                prompts.setdefault(question.text, prompt)
        shown = list(prompts.values())[:2]
        for stage, picture in explain_kept(model, processor, group[0].images[0], shown).items():
            yield f"kept-{group[0].sample}-{stage}.png", picture
