"""What the command for generation makes of what it measured."""

import numpy as np
import pandas as pd

from helpers.figures import generation


def table(in_place=1.5, others=1.2, eight=3.0):
    rows = []
    for case in ("after 128", "after 896", "first token, 128"):
        for label, speedup in (
            ("PyTorch", 0.5),
            ("unfused", 1.0),
            ("unfused, again", 9.0),
            ("onnxscript", others),
            ("transformers", np.nan),
            (generation.IN_PLACE, in_place),
            (generation.EIGHT, eight),
        ):
            row = {"case": case, "contender": label, "speedup": speedup, "low": speedup}
            row |= {"high": speedup, "ours": label.startswith(("fuse", "quantize"))}
            reason = "" if speedup == speedup else "IndexError: none"
            rows.append(row | {"error": 1e-5, "reason": reason, "processor": "a processor"})
    return pd.DataFrame(rows)


def test_what_is_wanted_is_held_against_what_was_measured():
    lines = generation.summary(table())
    assert len(lines) == 7  # two gains and the others after either prompt, the others at the first
    assert all(line.endswith("as wanted") for line in lines)
    missed = [line.endswith("missed") for line in generation.summary(table(1.05, 1.2, 2.4))]
    assert missed == [False, True, True, True, True, True, True]
    assert "0.88 over onnxscript" in generation.summary(table(1.05))[-1]


def test_the_page_has_a_row_for_each_contender():
    page = generation.markdown(table())
    assert "| transformers | IndexError: none |" in page
    assert "| fuse, in place | 1.50 (1.50 to 1.50) | " in page
    assert page.count("\n| ") == 9
