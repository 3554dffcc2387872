"""What could be trained, whatever executes it fastest: for questions about many models and cards."""

from __future__ import annotations

from edgepeft.plan.request import Candidate
from edgepeft.plan.search import Search
from edgepeft.spec import Precision


class QualitySearch(Search):
    """A search that settles length, precision and rank as a plan does, and keeps the leanest layout."""

    def fastest(self, length: int, precision: Precision, rank: int) -> Candidate:
        """The leanest layout."""
        return self.leanest(length, precision, rank)
