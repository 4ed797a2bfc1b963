"""The command for the forms of attention: all compute the same; the table, the page."""

import numpy as np
import pytest

from helpers import files
from helpers.figures.attention_forms import forms, measuring, table

HEADS, WIDTH, LENGTH, BATCH = 2, 8, 6, 2


@pytest.mark.parametrize("masked", [False, True])
def test_all_forms_compute_the_same(masked, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "HEADS", HEADS)
    given = measuring.arrays(WIDTH, LENGTH, BATCH, masked)
    outputs = {}
    for form in forms.FORMS:
        if masked or form not in forms.ONLY_MASKED:
            path = forms.save(form, HEADS, WIDTH, masked, tmp_path / "form.onnx")
            [outputs[form]] = files.session(path).run(None, given)
    standard = outputs[forms.STANDARD]
    assert standard.shape == (BATCH, LENGTH, HEADS * WIDTH)
    for form, output in outputs.items():
        np.testing.assert_allclose(output, standard, atol=1e-5, err_msg=form)
    if masked:  # half of the second sample: what is there makes no difference
        without = {**given, "x": given["x"].copy()}
        without["x"][1, given["attention_mask"][1] == 0] = 0
        [again] = files.session(path).run(None, without)
        kept = given["attention_mask"] == 1
        assert not kept.all()
        np.testing.assert_allclose(again[kept], output[kept], atol=1e-5)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Cells that are measured again replace their rows, and the rest stays."""
    two = {form: forms.FORMS[form] for form in (forms.STANDARD, "MultiHeadAttention")}
    monkeypatch.setattr(forms, "FORMS", two)
    csv = tmp_path / "forms.csv"
    command = ["--providers", "cpu", "--widths", "8", "--batches", "1", "--rounds", "2"]
    command += ["--csv", str(csv)]
    measuring.main([*command, "--lengths", "4", "6"])
    first = table.merge(csv, [])
    assert len(first) == 8
    assert (first["median"] > 0).all()
    assert (first[first["form"] == forms.STANDARD]["median"] == 1).all()
    assert csv.with_suffix(".svg").is_file()
    capsys.readouterr()
    measuring.main([*command, "--only-show"])
    shown = capsys.readouterr().out
    assert "no mask, D = 8, 1 × 4" in shown
    row = first.iloc[0].to_dict() | {"median": np.nan, "reason": "ValueError: too large"}
    again = table.merge(csv, [row])
    assert len(again) == 7  # of that cell, one form is left
    assert "ValueError: too large" in table.text(again)
    page = table.page(again)
    assert "| no mask, D = 8, 1 × 6 |" in page
    assert "![" in page
