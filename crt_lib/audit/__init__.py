"""What a model costs and what its predictions depend on, for any model."""

from crt_lib.audit.accounting import (
    parameter_report as parameter_report,
    speed_report as speed_report,
)
from crt_lib.audit.causality import (
    assert_causal as assert_causal,
    causality_report as causality_report,
)
from crt_lib.audit.protocols import padding_report as padding_report
