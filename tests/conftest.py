"""One compute thread, before torch is imported: ranks are forked, and forks dislike threads."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
for name in [n for n in os.environ if n.startswith("BIGTRAIN_")]:
    if name != "BIGTRAIN_UPDATE_GOLDEN":
        del os.environ[name]
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    os.environ.pop(name, None)
sys.path.insert(0, str(Path(__file__).parent))
