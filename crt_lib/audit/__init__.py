"""What a model costs and what its predictions depend on, for any model.

The package can be called: `crt_lib.audit(model)` is `causality_report(model)`.
"""

import sys
from types import ModuleType
from typing import Any

from crt_lib.audit.accounting import (
    parameter_report as parameter_report,
    speed_report as speed_report,
)
from crt_lib.audit.causality import (
    assert_causal as assert_causal,
    causality_report as causality_report,
)
from crt_lib.audit.protocols import padding_report as padding_report
from crt_lib.audit.report import CausalityReport


class _Package(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> CausalityReport:
        return causality_report(*args, **options)


audit = sys.modules[__name__]  # what `crt_lib.audit` is
audit.__class__ = _Package
