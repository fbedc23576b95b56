"""The measuring wing: real models, real texts, training, evaluation and reports around the library."""
