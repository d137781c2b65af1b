"""Without a copy of diffusers' tests, `test_diffusers_suite.py` says so; what is built on it is not collected."""

import os

collect_ignore = (
    [] if "DIFFUSERS_TESTS" in os.environ else ["test_autoregressive_suite.py", "test_diffusers_suite_diffusion.py"]
)
