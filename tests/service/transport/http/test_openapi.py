"""The document of the HTTP interface and its answers agree, whatever is asked."""

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

# What no schema can say: bytes that are no image and classes that a model does not have are 400,
# an image of too many pixels 413, a URL that is too long 414, a deadline that is too short 504; and
# to load and unload models is 403 unless a setting allows it.
CONFIG = schemathesis.Config.from_dict(
    {
        "checks": {
            "negative_data_rejection": {
                "expected-statuses": ["400", "403", "404", "413", "414", "415", "504"]
            },
            "positive_data_acceptance": {
                "expected-statuses": ["2xx", "400", "403", "404", "413", "504"]
            },
            "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "504"]},
        }
    }
)


def test_the_document_and_the_answers_agree(server):
    document = schemathesis.openapi.from_url(f"{server.http_url}/openapi.json", config=CONFIG)
    operations = [operation.ok() for operation in document.get_all_operations()]
    assert len(operations) == 21
    for operation in operations:
        # What has neither options nor a body cannot be asked wrongly.
        modes = list(GenerationMode) if operation.method == "post" else [GenerationMode.POSITIVE]
        for mode in modes:

            @given(operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=4, deadline=None, derandomize=True, suppress_health_check=HealthCheck
            )
            def agree(case):
                case.call_and_validate()

            agree()
