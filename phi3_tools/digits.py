"""What the small checkpoint is asked about handwritten digits, and what it should answer."""

from collections.abc import Callable, Sequence

from phi3_tools.images import DIGIT_NAMES

NAME_IT, IS_IT_EVEN, LARGER = "What digit is this?", "Is this digit even?", "Which of the two is larger?"
FIRST, SECOND = "What digit is the first?", "What digit is the second?"


def _larger(first: int, second: int) -> str:
    which = "neither" if first == second else "the first" if first > second else "the second"
    return f"{DIGIT_NAMES[first]} and {DIGIT_NAMES[second]}, so {which}"


# {number of images: {question about them: its answer, by the digits on them}}.
ANSWERS: dict[int, dict[str, Callable[..., str]]] = {
    1: {NAME_IT: lambda digit: DIGIT_NAMES[digit], IS_IT_EVEN: lambda digit: "no" if digit % 2 else "yes"},
    2: {
        LARGER: _larger,
        FIRST: lambda first, second: DIGIT_NAMES[first],
        SECOND: lambda first, second: DIGIT_NAMES[second],
    },
}
# The words that a digit is searched by.
PHRASES = ("{}", "the number {}", "the digit {}", "a picture of the number {}", "this is a {}")


def true_answer(question: str, *digits: int) -> str:
    """What the answer to a question about one or two images of these digits should be."""
    return ANSWERS[len(digits)][question](*digits)


def ask(question: str | None, images: Sequence = ()) -> list[dict]:
    """A question about images (any that the processor takes) as a conversation for `processor.apply_chat_template`."""
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": content + ([{"type": "text", "text": question}] if question else [])}]
