# A first model: children's stories of our own grammar.
