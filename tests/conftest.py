"Hypothesis profiles: `ci` draws the same few examples every time, `nightly` draws many new ones (HYPOTHESIS_PROFILE=nightly)."
import os

from hypothesis import HealthCheck, settings

slow_is_fine = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", max_examples=20, derandomize=True, database=None, **slow_is_fine)
settings.register_profile("nightly", max_examples=500, **slow_is_fine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
