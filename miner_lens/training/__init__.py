"""How were the organisms made? Scripts that train what ships, and the data they read."""

__all__: list[str] = []
