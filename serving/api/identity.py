"""Who answers: the model's names and the server's version, as `/info` and the headers show them.

Knows no request.
"""

from msgspec import Struct

from serving.plan import ModelFacts


class Identity(Struct, frozen=True, kw_only=True):
    """What is known before the model is loaded.

    Attributes:
        model_id: the hub's name, or the path as it was given.
        sha: the git commit of this server.
        docker_label: of the image that it runs in.
        compute_type: the operator's word for the hardware; None: the device's own name.
    """

    model_id: str
    version: str
    sha: str | None = None
    docker_label: str | None = None
    compute_type: str | None = None

    @property
    def system_fingerprint(self) -> str:
        """Which build answers."""
        return f"{self.version}-{self.docker_label or 'native'}"

    def compute_type_on(self, facts: ModelFacts) -> str:
        """The value of `x-compute-type`."""
        return self.compute_type or f"{facts.rank_count}-{facts.device}"
