"""How were the organisms made? Scripts that train what ships, and the data they read."""
