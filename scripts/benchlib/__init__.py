"""The parts of scripts/bench."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
