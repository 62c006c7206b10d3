#define HICL_ISA plain
#include "rows_impl.h"
