"""What tests of pipelines and of sinks need: real servers, fixtures that start them, and the sinks' contract."""

import sys

# The contract's assertions then say what they compared, as those in test files do.
if "pytest" in sys.modules:
    sys.modules["pytest"].register_assert_rewrite("delta_sync.testing.contract")
