"""Studies: many trainings and measurements that make one table and one figure. The programs in tools/ stand on it."""
