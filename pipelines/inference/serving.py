"""A Ray Serve application: the requests of the MLflow server, answered in batches that form while requests come in.

1. read     POST /invocations with `{"dataframe_records": [{"image", "prompt"}], "params": {...}}`; a body that is too
            long is refused before it is read to its end, everything else by `reading.py`, in threads of its own
2. gather   rows of all requests wait up to `batch_wait_s` for others, at most `batch_rows` together
3. answer   rows of equal budget are one batch of the model; a request gets its answers in its own order
4. refuse   requests beyond those in work and those that may wait get a 503 at once, by Serve's proxy

GET /ping and /health say that the replica lives. Answers and refusals have MLflow's form: `{"predictions": [...]}`, and
`{"error_code", "message"}` with a 4xx.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from meteor_model.answering import Answer, Answerer, RequestError
from meteor_model.limits import MAX_BYTES
from pipelines.inference.browser import is_foreign_page
from pipelines.inference.reading import Item, ReadingTimeoutError, RequestReader
from pipelines.inference.settings import ServeSettings
from pipelines.registry.open import apply_pruner, device_for, load_model
from pipelines.registry.versions import PinnedModel

APP_NAME = "meteor"
MAX_BODY_BYTES = MAX_BYTES * 4 // 3 + 2**20


def build_app(model: PinnedModel, settings: ServeSettings) -> Application:
    """The application, for `serve.run`.

    Args:
        model: as for `pipelines.registry.open.open_model`, readable where the replicas run.
        settings: how it is served.
    """
    deployment = serve.deployment(
        _Replica,
        name="answers",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.ongoing,
        max_queued_requests=settings.queued,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    application: Application = deployment.bind(model, settings)
    return application


def answerer_of(model: PinnedModel, settings: ServeSettings) -> Answerer:
    """The model that a replica answers with, on its device, under the pruner that is asked for.

    Raises:
        ValueError: a pruner that does not exist or that the model does not allow; or of `load_model`.
    """
    loaded, processor = load_model(model, device_for(settings.gpus))
    apply_pruner(loaded, processor, settings.pruner, settings.pruner_keep, settings.pruner_options)
    return Answerer(loaded, processor)


class _Replica:
    """One copy of the model and its queue of rows."""

    def __init__(self, model: PinnedModel, settings: ServeSettings) -> None:
        self._answerer = answerer_of(model, settings)
        self._reader = RequestReader(self._answerer, settings.limits, settings.read_threads, settings.read_s)
        self._origins = settings.origins
        self._gather.set_max_batch_size(settings.batch_rows)
        self._gather.set_batch_wait_timeout_s(settings.batch_wait_s)

    async def __call__(self, request: Request) -> Response:
        if is_foreign_page(request.headers, self._origins):
            return _refusal(
                403, "PERMISSION_DENIED", "no web page may ask this server; name its origin in serve.origins"
            )
        if request.url.path in ("/ping", "/health"):
            return Response("\n")
        if request.url.path != "/invocations":
            return _refusal(404, "ENDPOINT_NOT_FOUND", f"{request.url.path} is unknown; POST to /invocations")
        if request.method != "POST":
            return _refusal(405, "BAD_REQUEST", f"{request.method} is not allowed; POST to /invocations")
        body = await _read_body(request)
        if body is None:
            return _refusal(413, "BAD_REQUEST", f"the request is longer than {MAX_BODY_BYTES} bytes")
        try:
            items = await self._reader.read(body)
        except RequestError as error:
            return _refusal(400, "INVALID_PARAMETER_VALUE", str(error))
        except ReadingTimeoutError as error:
            return _refusal(503, "TEMPORARILY_UNAVAILABLE", str(error))
        answers = await asyncio.gather(*(self._gather(item) for item in items))
        return JSONResponse({"predictions": [answer.text for answer in answers]})

    @serve.batch  # sizes are set per replica
    async def _gather(self, items: list[Item]) -> list[Answer]:
        return await asyncio.to_thread(answer_items, items, self._answerer)


def answer_items(items: Sequence[Item], answerer: Answerer) -> list[Answer]:
    """Answers in the order of the items; those of equal budget are answered together."""
    answers: dict[int, Answer] = {}
    for budget in dict.fromkeys(budget for _, budget in items):
        places = [place for place, (_, wanted) in enumerate(items) if wanted == budget]
        given = answerer.answer([items[place][0] for place in places], budget)
        answers.update(zip(places, given, strict=True))
    return [answers[place] for place in range(len(items))]


async def _read_body(request: Request) -> bytes | None:
    """The body, or None where it is longer than MAX_BODY_BYTES: by what it says, and by what comes."""
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > MAX_BODY_BYTES:
        return None
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY_BYTES:
            return None
        pieces.append(piece)
    return b"".join(pieces)


def _refusal(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error_code": code, "message": message}, status_code=status)
