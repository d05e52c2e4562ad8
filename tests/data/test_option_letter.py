"""Letters of options, by hand and beside lmms-eval 0.7.3, of whose code nothing is here."""

from __future__ import annotations

import pytest

from miner_lens.data.option_letter import option_letter

BY_HAND = [
    ("b", "B"),
    ("B)", "B"),
    ("B.", "B"),
    ("'B'", "B"),
    ("B\n\nbecause C is wrong", "B"),
    ("B dog", "B"),
    ("B because A is wrong", "B"),
    ("A", "A"),
    ("a", "A"),
    ("A.", "A"),
    ("A: a cat", "A"),
    ("I", "I"),
    ("A dog", None),
    ("a dog", None),
    ("Answer: A dog", None),
    ("The answer is A dog", None),
    ("The answer is A because it barks", "A"),
    ("The answer is a.", "A"),
    ("The answer is B: a dog", "B"),
    ("The answer is red", None),
    ("The answer: I don't know", None),
    ("The answer is I think B", "B"),
    ("The answer to this question is D.", "D"),
    ("My answer would be D, since it barks", "D"),
    ("The best answer is choice B.", "B"),
    ("The letter is B", "B"),
    ("I'd go with D", "D"),
    ("It's B", "B"),
    ("It must be (B)", "B"),
    ("B is the correct answer", "B"),
    ("D. The answer is in the picture", "D"),
    ("A. cat\nB. dog\nAnswer: B", "B"),
    ("The nearest of these is:\n\n**F. 112 hp**", "F"),
    ("#### B", "B"),
    # Several, or none of them
    ("A or B", None),
    ("B/C", None),
    ("A, B, C, D", None),
    ("The answer is (A) or (B).", None),
    ("Options A and B", None),
    ("Neither A nor B", None),
    ("Both A and B are correct", None),
    ("A and B are wrong, so C", "C"),
    ("The answer is not A but B", "B"),
    ("The answer isn't A.", None),
    ("B is wrong", None),
    ("Option A is wrong, option C is right", "C"),
    ("B, because C is wrong", "B"),
    # The last word counts
    ("The answer is A. Wait, no: the answer is B.", "B"),
    ("<think>Maybe the answer is A</think>B", "B"),
    (r"so $\boxed{\text{(C)}}$ as the answer is A", "C"),
    (r"\boxed{\text{dog}}", None),
    # Other scripts, which put no space around a letter
    ("\u7b54\u6848\u662fB", "B"),
    ("\u9009B", "B"),
    ("\u7b54\u6848\uff1aB", "B"),
    ("B\u9009\u9879\u662f\u6b63\u786e\u7684", "B"),
    ("\u6b63\u89e3\u306fB\u3067\u3059", "B"),
    ("\uc815\ub2f5\uc740 B\uc785\ub2c8\ub2e4", "B"),
    ("\uff08\uff22\uff09", "B"),
    # Letters of other things
    ("It is 25 \u00b0C", None),
    ("U.S.A.", None),
    ("C++", None),
    ("e.g. dogs", None),
    ("It is E. coli", None),
    ("so v = D/t", None),
    ("None of the above", None),
]

# Answers of lmms-eval's own tests and documents, and of MMMU's published outputs (shortened), with
# what is read by its extract_mcq_answer, by its parse of MMMU (None where that draws lots), by us.
PUBLISHED = [
    ("The correct answer is (B).", "B", "B", "B"),
    ("The correct answer is (N).", None, None, "N"),  # there of options to H
    ("The answer is A.", "A", "A", "A"),
    ("So the correct answer is C.", "C", "C", "C"),
    ('{"choice": "B. Ribosome"}', "B", "B", "B"),
    ("Step one... <ANSWER> C </ANSWER>", "C", "C", "C"),
    ("first <ANSWER> A </ANSWER> then <ANSWER> D </ANSWER>", "D", "D", "D"),
    ("The correct answer is (C) because the diagram shows a Golgi body.", "G", "C", "C"),
    # Brackets and line breaks are known to the parse of MMMU less well.
    ("A) Josef Albers", "A", None, "A"),
    (r"Thus, the correct option is: \[ \boxed{D} \]", "D", None, "D"),
    # Letters of an option's text count there, the last of them.
    ("B. A Renaut body", "B", "A", "B"),
    ("A. point C", "A", "C", "A"),
    # All letters count there, also of options that are gone through.
    ("(G) Cytoplasm (H) Centrioles. So it is B.\n\nAnswer: B", "B", "H", "B"),
    # Small letters are none there, and those of a word may be.
    ("<ANSWER> b </ANSWER>", "E", None, "B"),
    # Several options, and none: they settle for one.
    ('{"choice": "A or B"}', "A", "A", None),
    ("(A) 20.0%\n(B) 30.0%\n(C) 40.0%", "C", "C", None),
    ("Answer: Not listed", "A", None, None),
]


@pytest.mark.parametrize(("answer", "letter"), BY_HAND)
def test_by_hand(answer: str, letter: str | None) -> None:
    assert option_letter(answer) == letter


@pytest.mark.parametrize("case", PUBLISHED)
def test_published(case: tuple[str, str | None, str | None, str | None]) -> None:
    answer, *_, ours = case
    assert option_letter(answer) == ours


def test_where_we_differ_from_lmms_eval() -> None:
    """In what is said of several options or of none, of which it chooses."""
    both = [ours for _, lmms, mmmu, ours in PUBLISHED if lmms == mmmu and lmms != ours]
    assert both == ["N", None, None]
