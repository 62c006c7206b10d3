#define HICL_ISA avx2
#include "rows_impl.h"
