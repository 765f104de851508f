"""Graph passes: a graph or facts about it come out; nothing is run and nothing global is changed."""
