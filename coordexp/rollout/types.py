"""What goes into a rollout backend and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from coordexp.errors import EXIT_BAD_INPUT, RolloutError

IMAGE_TAG = "<image>"
REFUSED_TAGS = (
    "<img>", "</img>", "<video>", "<audio>", "<bbox>", "<ref-object>", "<cot-process>", "<start-image>",
    "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
)  # fmt: skip
"""What a template would replace in the text of a message: by a file that the text names, or by media nobody sent."""


class RequestError(RolloutError):
    """A request that no backend can answer, whatever its state."""

    exit_code = EXIT_BAD_INPUT


@dataclass(frozen=True)
class RolloutRequest:
    """One question: messages with an `<image>` placeholder for each image, and the images in their order.

    images: paths; a server, which reads no files of its callers, is given the bytes of files.
    seed: of this request's sampling; None leaves it to the backend. Greedy decoding and beams do not look at it.
    request_id: what errors call this request; empty for its index.

    Raises:
        RequestError: the text holds one of `REFUSED_TAGS`, or not as many `<image>` as there are images.
    """

    messages: tuple[dict[str, str], ...]
    images: tuple[str | bytes, ...]
    seed: int | None = None
    request_id: str = ""

    def __post_init__(self) -> None:
        name = f"request {self.request_id}" if self.request_id else "a request"
        texts = [message["content"] for message in self.messages]
        for tag in REFUSED_TAGS:
            if any(tag in text for text in texts):
                raise RequestError(
                    f"{name}: its text holds {tag!r}, which templates replace by media. Write the word without "
                    f"brackets, and give images beside the text, with {IMAGE_TAG} where each belongs."
                )
        num_tags = sum(text.count(IMAGE_TAG) for text in texts)
        if num_tags != len(self.images):
            raise RequestError(
                f"{name}: its text holds {IMAGE_TAG} {num_tags} times, but {len(self.images)} images were given; "
                "expected one for each."
            )


@dataclass(frozen=True)
class BinDistribution:
    """What a coordinate was read from: the model's distribution over the bins at that position, in short.

    mass: probability of all coordinate tokens together, before any processing.
    bins, weights: atoms that stand for the distribution over them; a bin may occur more than once.
    """

    mass: float
    bins: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Rollout:
    """One answer.

    prompt_token_ids: as the model saw them, image placeholders expanded.
    response_token_ids, token_logprobs: same length; log-probabilities under the unprocessed distribution (nats).
        Without log-probabilities (beams, or when not asked for) `token_logprobs` is empty.
    finish_reason: "stop" or "length".
    seconds: wall time of the batch that this answer came from, divided by the batch size.
    policy_version: version of the weights that wrote the answer, as given to `push_policy`; 0 before any push.
    repeat_terminated: whether repeat-aware termination ended the answer.
    coord_distributions: one per token of the answer, None where that is no coordinate; empty when not asked for, or
        from a backend that does not show them.
    retokenized: whether the token ids come from the answer's text, and may not be those the model wrote.
    """

    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: str
    seconds: float
    policy_version: int = 0
    repeat_terminated: bool = False
    retokenized: bool = False
    coord_distributions: tuple[BinDistribution | None, ...] = ()
