"""What clips say at each token, and what is spoken of easy-VQA."""

from __future__ import annotations

import numpy as np
import pytest

from miner_lens.training import speak, spoken_shapes
from miner_lens.training.speech_clips import FRAMES_PER_TOKEN, heard, make_extractor


def test_parts_of_a_word_share_its_time() -> None:
    seconds = 2.0
    samples = np.zeros(int(seconds * speak.RATE), dtype=np.float32)
    words = (("red", 0.2, 0.6), ("teal", 0.8, 1.6))
    manner = speak.Manner("en", 170, 50, "none", None, 0.5)
    mel, frames, label = heard(
        speak.Recording(samples, words, manner), make_extractor(), {"red": [0], "teal": [2, 1]}
    )
    assert frames == seconds * 100
    assert mel.shape[0] == 80
    for token, part in enumerate(label):
        center = (token + 0.5) * FRAMES_PER_TOKEN / 100
        wanted = 3  # silence
        if 0.2 <= center < 0.6:
            wanted = 0
        elif 0.8 <= center < 1.6:
            wanted = 2 if center < 1.2 else 1
        assert part == wanted, center


def test_what_is_spoken_is_known() -> None:
    assert len(spoken_shapes.descriptions()) == 288
    assert len(spoken_shapes.questions()) == 107
    words = spoken_shapes.vocabulary()
    assert len(words) == 66
    assert {"teal", "rectangle", "not"} <= {*words}


@pytest.mark.parametrize("asks", [False, True])
def test_all_that_is_spoken_is_in_the_vocabulary(asks: bool) -> None:
    texts = spoken_shapes.questions() if asks else spoken_shapes.descriptions()
    known = {*spoken_shapes.vocabulary()}
    for text in texts:
        assert {word.strip(".,?:") for word in text.split()} <= known, text
