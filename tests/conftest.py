"""What every test run needs from its environment, before anything is imported that reads it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")  # on the CPU, compiling shells out to a C++ compiler for seconds
