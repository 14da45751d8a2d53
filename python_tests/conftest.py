"""Before torch is loaded: OpenMP's idle threads must not spin for long, or a busy neighbour makes every test crawl."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
