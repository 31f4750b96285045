"""docs/by_hand.ipynb: its cells still run, and print what is stored in it. No Jupyter is needed."""
import base64
import contextlib
import io
import json
import sys

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from conftest import ROOT

NOTEBOOK = json.loads((ROOT / "docs/by_hand.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("folder", ["docs", "."])  # where Jupyter and an editor start it
def test_the_notebook_prints_what_is_stored_in_it(folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(sys, "path", sys.path[:])
    pyplot.switch_backend("agg")
    names, pictures = {}, 0
    for cell in CODE:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        texts = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
        assert printed.getvalue() == "".join(texts), cell["id"]
        # a picture is stored as Jupyter draws it; a few levels of grey are rounding
        stored = [output["data"]["image/png"] for output in cell["outputs"] if "data" in output]
        for number, png in zip(pyplot.get_fignums(), stored, strict=True):
            drawn = io.BytesIO()
            pyplot.figure(number).savefig(drawn, format="png", bbox_inches="tight")
            old, new = (np.asarray(Image.open(file).convert("RGB"), dtype=float)
                        for file in (io.BytesIO(base64.b64decode(png)), drawn))
            assert old.shape == new.shape and abs(old - new).mean() < 0.5
            pictures += 1
        pyplot.close("all")
    assert pictures == 1


def test_its_figures_of_the_toy_are_those_of_toy_md():
    told, = [cell for cell in NOTEBOOK["cells"] if cell["id"] == "formula"]
    told, page = (" ".join(text.split()) for text in ("".join(told["source"]), (ROOT / "docs/toy.md").read_text()))
    assert "30 % of the observations are right. The answers score 0.60 after these and 0.43 after others" in told
    assert "30 % of the observations are sufficient" in page
    assert "answers score 0.60 after these and 0.43 after others" in page
    assert "pushes of 0.14 and 1.01, so 14 %, and an $R^2$ of 0.01" in told
    assert "| PA-GRPO | +1.01 |" in page and "| GRPO | +0.14 | −0.09 | 0.01 |" in page
