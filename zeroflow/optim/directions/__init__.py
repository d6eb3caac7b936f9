"""Step 2: from the estimates so far to the vector for the update, one direction per file."""

from zeroflow.optim.directions.direction import Direction, Identity, Step
from zeroflow.optim.directions.history import DirectionHistory, History
from zeroflow.optim.directions.orthogonal import Orthogonal
from zeroflow.optim.directions.sign import Sign
from zeroflow.optim.directions.svrg import SVRG

__all__ = ["SVRG", "Direction", "DirectionHistory", "History", "Identity", "Orthogonal", "Sign", "Step"]
