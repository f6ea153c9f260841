"""From a name to weights: what a name refers to (:mod:`~selfpruner.models.sources`), and the loaded model."""

from selfpruner.models.loading import LoadedModel as LoadedModel
from selfpruner.models.loading import as_written as as_written
from selfpruner.models.loading import check_ids as check_ids
from selfpruner.models.loading import choose_device as choose_device
from selfpruner.models.loading import choose_dtype as choose_dtype
from selfpruner.models.loading import load as load
from selfpruner.models.loading import read_config as read_config
from selfpruner.models.sources import ModelSource as ModelSource
from selfpruner.models.sources import embedded_file as embedded_file
from selfpruner.models.sources import hub_available as hub_available
from selfpruner.models.sources import hub_offline as hub_offline
from selfpruner.models.sources import precheck as precheck
from selfpruner.models.sources import quiet as quiet
from selfpruner.models.sources import resolve as resolve
