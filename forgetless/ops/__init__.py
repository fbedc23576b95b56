"""The functional op: a frozen linear layer plus a low-rank update, on three backends."""
