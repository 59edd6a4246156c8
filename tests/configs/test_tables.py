import pytest

from configs import ablations, tables
from semanticvla_jax.models.semanticvla import build


def settings(row, size):
  return tables.get_config(f"{row}@{size}").to_dict()


@pytest.mark.parametrize("row", tables.ROWS)
def test_rows_differ_in_the_model_alone(row):
  own, full = settings(row, "small64"), settings("full", "small64")
  build(own.pop("model"))
  del full["model"]
  assert own == full


def test_rows_are_trained_as_their_configs_say_at_7b():
  assert tables.get_config("table4_sa_sa@7b").to_dict() == ablations.get_config("table4_sa_sa@7b").to_dict()
  with pytest.raises(ValueError, match="config argument: got 'nothing@7b'"):
    tables.get_config("nothing@7b")
