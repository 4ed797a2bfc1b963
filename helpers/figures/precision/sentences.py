"""What all-MiniLM-L6-v2 is judged by: the sentence pairs of notebook 02."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from helpers import models
from helpers.figures.cells import ASSETS

SIDES = ("right", "left")  # of the padding
TOGETHER = 32  # sentences in a batch, as in the notebook

# To calibrate on: none of them is in a pair.
OTHERS = """\
The kettle boiled over while she looked for her glasses.
Why are the street lamps on at noon?
Tickets can be returned up to one hour before the concert begins.
A cat slept on the warm bonnet of the car.
Please close the gate behind you.
The committee could not agree on a date, so the vote was put off until spring.
He plays the violin better than anyone else in the village.
Rice is grown on terraces that are older than the city below them.
I have never seen such a large crowd at a library.
The new tram line will cut the journey to the airport by a quarter.
Snow fell all night, and by morning the road had gone.
Water the tomatoes twice a week, but never at midday.
My brother sold his motorcycle and bought a piano.
Three of the five engines passed the test; the others leaked oil.
How much does it cost to send a parcel to Norway?
The museum keeps its oldest maps in a dark room without windows.
Their first album was recorded in a garage in eleven days.
Wash your hands before you touch the lens.
The judge read the letter aloud and then folded it with great care.
Prices of coffee have doubled since the drought in the highlands.
Nobody remembers who planted the oak in front of the school.
She asked the driver to wait, ran upstairs, and came back with two suitcases and a parrot.
This medicine should not be taken together with grapefruit juice.
The river is too shallow for boats in September.
An error in the third chapter was corrected in the second edition.
Can we move the sofa closer to the wall?
After the storm, fishermen mended their nets on the quay until late in the evening.
The battery lasts about nine hours if the screen is dimmed.
Good bread needs flour, water, salt and time.
They named the comet after the night guard who had first seen it.
The lecture was dull, yet half of the audience stayed for the questions.
Turn left at the bakery, cross the bridge, and you will see the station.""".splitlines()


@functools.cache
def _tokenizer() -> Any:
    return models.load("minilm").processor


def tokens(some: Sequence[str], side: str = "right") -> dict[str, np.ndarray]:
    """input_ids, token_type_ids and attention_mask, (sentences, length), padded on that side."""
    tokenizer = _tokenizer()
    tokenizer.padding_side = side
    encoded = tokenizer([*some], padding=True, truncation=True, return_tensors="np")
    return {name: array.astype(np.int64) for name, array in encoded.items()}


def batches() -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """All sentences of the pairs, by the side of the padding and the number of the first."""
    pairs = pd.read_csv(ASSETS / "sentence_pairs.csv")
    every = [*pairs["first"], *pairs["second"]]
    return {
        (side, start): tokens(every[start : start + TOGETHER], side)
        for side in SIDES
        for start in range(0, len(every), TOGETHER)
    }


def spearman(embeddings: np.ndarray) -> float:
    """The rank correlation of the cosine of each pair with its grade.

    `embeddings` are (sentences, width), of length 1: the first of all pairs, then the second.
    """
    first, second = np.split(embeddings, 2)
    grades = pd.read_csv(ASSETS / "sentence_pairs.csv")["similarity"]
    return float(stats.spearmanr((first * second).sum(1), grades).statistic)
