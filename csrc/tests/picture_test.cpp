// examples/cpp/picture.h.
#include "../../examples/cpp/picture.h"

#include "check.h"
#include "files.h"
#include "message_of.h"

using namespace flexdit::test;
using picture::Images;
using picture::netpbm;

namespace {

std::string bytes(std::initializer_list<int> values) {
  std::string out;
  for (const int value : values) out += static_cast<char>(value);
  return out;
}

}  // namespace

TEST_CASE(gray_values) {
  const std::vector<float> values = {-1, 1, 0, -2, 3, NAN, -0.5f, 0.5f, 1 - 1e-6f};
  CHECK_EQ(netpbm({values, 1, 3, 3}, 1, 1), "P5 3 3 255\n" + bytes({0, 255, 128, 0, 255, 0, 64, 191, 255}));
}

TEST_CASE(places) {
  std::vector<float> values;  // five images of 1 x 2, told apart by their values
  for (int i = 0; i < 10; ++i) values.push_back(static_cast<float>(i) / 127.5f - 1);
  CHECK_EQ(netpbm({values, 1, 1, 2}, 3, 1), "P5 6 2 255\n" + bytes({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0}));
  CHECK_EQ(netpbm({values, 1, 1, 2}, 99, 1), "P5 10 1 255\n" + bytes({0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
  CHECK_EQ(netpbm({std::span(values).first(2), 1, 2, 1}, 1, 2), "P5 2 4 255\n" + bytes({0, 0, 0, 0, 1, 1, 1, 1}));
}

TEST_CASE(colors) {
  std::vector<float> values;  // channels of 1 x 2 pixels
  for (int i = 0; i < 8; ++i) values.push_back(static_cast<float>(i) / 127.5f - 1);
  CHECK_EQ(netpbm({values, 4, 1, 2}, 1, 1), "P6 2 1 255\n" + bytes({0, 2, 4, 1, 3, 5}));
  CHECK_EQ(netpbm({values, 2, 1, 2}, 2, 1), "P5 4 1 255\n" + bytes({0, 1, 4, 5}));
}

TEST_CASE(bad_arguments) {
  const std::vector<float> values(6);
  const auto refused = [](const Images& images, int64_t columns, int64_t zoom) {
    return !message_of<std::invalid_argument>([&] { netpbm(images, columns, zoom); }).empty();
  };
  CHECK(!refused({values, 1, 2, 3}, 1, 1));
  CHECK(refused({values, 1, 2, 2}, 1, 1) && refused({values, 0, 2, 3}, 1, 1) && refused({values, 1, -2, -3}, 1, 1));
  CHECK(refused({values, 1, 2, 3}, 0, 1) && refused({values, 1, 2, 3}, 1, 0) && refused({{}, 1, 2, 3}, 1, 1));
}

TEST_CASE(files_are_whole) {
  const TemporaryFolder folder;
  const auto path = folder / "x.pgm";
  const auto files = [&] { return std::distance(std::filesystem::directory_iterator(folder.string()), {}); };
  picture::write_whole(path.string(), "old");
  picture::write_whole(path.string(), std::string("new\0", 4));
  CHECK_EQ(read_file(path), std::string("new\0", 4));
  CHECK_EQ(files(), 1);
  std::filesystem::remove(path);
  std::filesystem::create_directories(path / "full");  // a rename onto it fails
  const auto message = message_of<std::system_error>([&] { picture::write_whole(path.string(), "x"); });
  CHECK_NOTE(message.find("cannot write " + path.string()) == 0, message);
  CHECK_EQ(files(), 1);
  CHECK(!message_of<std::system_error>([&] { picture::write_whole(folder.string() + "/no/x", "x"); }).empty());
}
