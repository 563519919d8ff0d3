"""What the parts of a model are, read off the value graph, each fact with its evidence."""

from modernizer.model_map.map import Evidence, ModelMap, Role, read_model

__all__ = ["Evidence", "ModelMap", "Role", "read_model"]
