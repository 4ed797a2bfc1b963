"""A plot has its text alternative on it, and is the same each time."""

from xml.dom import minidom

from matplotlib.figure import Figure

from helpers.plots import WIDTH, Plot

TEXT = 'Speed-up over "eager" (1.00): ours < 2 & more.'


def plot() -> Plot:
    figure = Figure(figsize=(WIDTH, 2))
    figure.subplots().plot([1, 2], [3, 4])
    return Plot(figure, TEXT)


def test_a_plot_carries_its_text():
    shown = plot()._repr_mimebundle_()
    assert shown["text/plain"] == TEXT
    root = minidom.parseString(shown["image/svg+xml"]).documentElement
    assert root.getAttribute("role") == "img"
    assert root.getAttribute("aria-label") == TEXT
    [title] = [node for node in root.childNodes if node.nodeName == "title"]
    assert title.firstChild.data == TEXT
    assert 780 < float(root.getAttribute("width").removesuffix("pt")) * 96 / 72 < 820  # pixels


def test_a_plot_is_the_same_each_time():
    assert plot().svg() == plot().svg()
