"""One table a file: `data` gives its numbers, `table` what is seen and said below it.

Either raises NotDrawn where the records do not hold what the table needs.
"""
