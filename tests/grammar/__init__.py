"""A grammar of legacy programs: whole runnable models, made by combining the idioms that such code is written in."""
