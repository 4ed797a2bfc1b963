"""Progress in a notebook is one line, overwritten; what is to stay, stays."""

import nbclient
import nbformat

FIRST = """
import logging
from helpers import quiet
quiet.notebook()
log = logging.getLogger("helpers.a")
"""
SECOND = """
for number in range(3):
    log.info(f"round {number} …")
log.info("3 rounds")
log.info("making a …")
log.info("making b …")
print("done")
log.debug("not shown")
logging.getLogger("another").info("not shown")
"""


def shown(cell) -> list[str]:
    return [output.get("text") or output.data["text/plain"] for output in cell.outputs]


def test_progress_is_overwritten_within_a_cell():
    sources = [FIRST, SECOND, "log.info('making c …')"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook).execute()
    assert [shown(cell) for cell in notebook.cells] == [
        [],
        ["3 rounds", "making b …", "done\n"],
        ["making c …"],
    ]
