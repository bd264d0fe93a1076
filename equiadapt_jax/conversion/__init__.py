"""Weight files → parameter trees, by one declarative table for each layout.

`files` and `hub` find and read, `recognition` says what the arrays are, `layouts` holds the tables,
`filling` applies one and checks, `positions` changes the grid of position embeddings. Only NumPy is
needed; `predictors.load` puts it all together.
"""
