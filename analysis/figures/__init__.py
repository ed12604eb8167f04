"""One figure a file: `data` is what it shows, `draw` writes it.

Each `draw` writes NAME.pdf, .png and .txt (the caption) and returns these files. It raises NotDrawn
where the records do not hold what the figure needs.
"""
