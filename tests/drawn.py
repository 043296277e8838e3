"""What is written in a figure, for the tests of several rooms."""

from matplotlib.figure import Figure
from matplotlib.text import Text


def texts(figure: Figure) -> set[str]:
    """Every title, label, tick and note of a figure."""
    figure.draw_without_rendering()
    return {text.get_text() for text in figure.findobj(Text)}
